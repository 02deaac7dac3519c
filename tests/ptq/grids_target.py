"""Prints digests of observers' statistics, of grids made from them, and of weights on grids.

    python -m tests.ptq.grids_target

NUMBA_CPU_NAME chooses the CPU to compile for.
"""

import hashlib

import numpy as np

from lockstep.ops.rounded.observe import cleared
from lockstep.ops.rounded.observe_cpu import CPU
from lockstep.ptq.observers import Stat
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold
from tests.ops.rounded.test_observe import count

ACTIVATIONS = ["i8", "u8:p99.9", "i4/head:mse", "u4/head:mse", "fp8/head:p99", "nvfp4"]
WEIGHTS = ["i4", "u4/row:mse", "u3/32:mse", "fp4:mse", "mxfp4", "nvfp4", "q4_0"]


def digests() -> dict[str, str]:
    """{statistic, grid or weight: digest}, computed from the same numbers in every process."""
    rng = np.random.default_rng(23)
    x = (rng.standard_normal((37, 96)) * np.exp2(rng.integers(-6, 6, (1, 96)))).astype(np.float32)
    words, stat = cleared(3, 1), Stat.empty("L0.q", 3)
    count(CPU, x, words=words, stride=32, head_width=32, num_heads=3)
    made = {"counters": words.copy()}
    stat.take(words)
    made |= {f"activations {text}": stat.solve(Spec.parse(text)) for text in ACTIVATIONS}
    made |= {f"weights {text}": fold(x, Spec.parse(text)).values for text in WEIGHTS}
    return {name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in made.items()}


if __name__ == "__main__":
    print(*(f"{name}: {digest}" for name, digest in digests().items()), sep="\n")
