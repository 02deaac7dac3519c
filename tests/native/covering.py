"""Kernels that together run every line that emits code for ARM: their machine code for four CPUs.

    python -m tests.native.covering
    python -m tests.native.covering neoverse-v2,apple-m4

prints {"missing": [[file, function, line]], "products": {kernel: {CPU: {instruction: count}}}}. Every format's linear
layer and embedding are among them; kernels of many rows and of attention where they differ, small kernels for the rest.
With CPUs: integers of many rows alone, as they are emitted for the first, which may multiply two rows at a time.
"""

import importlib
import json
import sys

from tests.native import assembly
from tests.native.emitting import Ran, missing

CPUS = ("neoverse-n1", "neoverse-v2", "apple-m1", "apple-m4")
LARGE = """lockstep.ops.linear.linear_cpu:linear_q6_k lockstep.ops.linear.linear_cpu:linear_bf16
lockstep.ops.attention.attention_cpu:attention_bf16 lockstep.ops.attention.attention_cpu:attention_q8
lockstep.ops.attention.kv_cache_cpu:attention_inputs lockstep.ops.attention.kv_cache_q8_cpu:attention_inputs_q8
lockstep.ops.elementwise.activations_cpu:quantize_q8 lockstep.ops.elementwise.rms_norm:_run
lockstep.lab.ceiling:multiply_f32 lockstep.lab.ceiling:multiply_int8
lockstep.lab.ceiling:stream"""

MANY_ROWS = [f"lockstep.ops.linear.linear_cpu:linear_{format}" for format in ("q8_0", "q4_0", "q2_k", "q6_k")]
MANY_ROWS.append("tests.native.small_kernels:codes_fixed")


def covering() -> list[str]:
    """Their paths."""
    small, formats = (importlib.import_module(name) for name in ("tests.native.small_kernels", "lockstep.formats"))
    linear = [f"lockstep.ops.linear.linear_cpu:linear_{format}_per_token" for format in formats.FORMATS]
    embed = [f"lockstep.ops.elementwise.embed_cpu:embed_{format}" for format in formats.FORMATS]
    return [*LARGE.split(), *linear, *embed, *assembly.THREADS, *small.PATHS]


def main() -> None:
    named = sys.argv[1].split(",") if sys.argv[1:] else []
    cpus = named or CPUS
    assembly.initialize()
    assembly.pretend(cpus[0])
    with Ran() as ran:
        texts = {path: assembly.emitted(path) for path in (MANY_ROWS if named else covering())}
    products = {path: {cpu: assembly.counted(text, cpu) for cpu in cpus} for path, text in texts.items()}
    print(json.dumps(dict(missing=missing(ran.lines), products=products)))


if __name__ == "__main__":
    main()
