"""How much memory a process takes for keys and values of 32,768 tokens, against a count by hand:
python -m tests.engine.cache.kv_memory

Models of a few layers with random weights and a vocabulary of 96 tokens, whose keys and values have the sizes of those
that people have. Each is measured in a process of its own: its resident memory before a prompt of 32,768 tokens and
after the last of the tokens generated to it. Exit status 1 if one takes over 5 % more or less than counted. It takes
some minutes.
"""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.store import WeightStore
from tests.engine.cache.test_kv_count import STEP, TOKENS, Layers
from tests.models import tiny
from tests.models.cases import CASES, capped, large_heads, windowed

NEW = 8  # tokens of the answer
PR_SET_THP_DISABLE = 41
SIZES = dict(max_position_embeddings=TOKENS)
TYPES = [f"{sort}_attention" for sort in ("sliding", "sliding", "full", "full")]
# config, layers that see all keys, layers with a window, the window
MODELS = {
    "gpt_oss": (
        {**CASES["gpt_oss"], **SIZES, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
        | dict(num_hidden_layers=4, sliding_window=128),
        Layers(2, 8, 64),
        Layers(2, 8, 64),
        128,
    ),
    "gemma2": (
        capped(**SIZES, num_hidden_layers=4, num_key_value_heads=4, head_dim=128, sliding_window=4096),
        Layers(2, 4, 128),
        Layers(2, 4, 128),
        4096,
    ),
    "gemma3": (
        windowed(**SIZES, num_hidden_layers=6, sliding_window_pattern=6, num_key_value_heads=4, head_dim=256)
        | dict(sliding_window=1024),
        Layers(1, 4, 256),
        Layers(5, 4, 256),
        1024,
    ),
    "gemma4, values are keys": (
        large_heads(**SIZES, head_dim=256, global_head_dim=512, num_attention_heads=2, num_key_value_heads=2)
        | dict(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"], sliding_window=1024),
        Layers(1, 1, 512),
        Layers(5, 2, 256),
        1024,
    ),
    "gemma4, shared keys": (
        large_heads(**SIZES, head_dim=256, global_head_dim=512, num_attention_heads=1, num_key_value_heads=1)
        | dict(
            attention_k_eq_v=False,
            num_hidden_layers=8,
            layer_types=TYPES * 2,
            num_kv_shared_layers=4,
            sliding_window=512,
        ),
        Layers(2, 1, 512),
        Layers(2, 1, 256),
        512,
    ),
}


def resident_bytes() -> int:
    """Memory of this process that is in use now, without pages of files, which the system may drop at any time."""
    ctypes.CDLL(None).malloc_trim(0)  # what compiling left, and would be given back later
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def measure(name: str) -> int:
    """Bytes that a request of TOKENS tokens adds to this process."""
    config = MODELS[name][0]
    # a short prompt would take a huge page of each array, so that the long one seemed to take less
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write(Path(folder) / "m", config, tiny.tensors(config, 1))
        model = load_model(open_checkpoint(path), WeightStore(), "f32", "bf16", TOKENS)
        engine = Engine(model, EngineOptions(max_requests=1, max_step_tokens=STEP))
        for source in engine.runner.program.sources():
            source.cover(TOKENS)  # tables of cosines and sines are no keys
        prompt = np.random.default_rng(0).integers(3, 96, TOKENS - NEW).tolist()
        answered(engine, prompt[: 2 * STEP])
        before = resident_bytes()
        answered(engine, prompt[::-1])
        after = resident_bytes()
        engine.close()
    return after - before + num_bytes(name, 2 * STEP)


def answered(engine: Engine, prompt: list[int]) -> None:
    request = engine.add(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True))
    while request.finish_reason is None:
        engine.step()


def num_bytes(name: str, num_tokens: int) -> int:
    """Keys and values of a prompt, by counting: all of them, or those of a window and a step."""
    _, full, few, window = MODELS[name]
    return full.token_bytes * num_tokens + few.token_bytes * min(num_tokens, window + STEP - 1)


def main(names: list[str]) -> int:
    """Prints a line for each model; returns the exit status."""
    if names:
        print(measure(names[0]))
        return 0
    status = 0
    for name in MODELS:
        command = [sys.executable, "-m", "tests.engine.cache.kv_memory", name]
        found, counted = int(subprocess.run(command, check=True, capture_output=True).stdout), num_bytes(name, TOKENS)
        whole = (MODELS[name][1].token_bytes + MODELS[name][2].token_bytes) * TOKENS
        print(
            f"{name}: {found / 1e6:.1f} MB taken, {counted / 1e6:.1f} MB counted ({found / counted:.3f}); "
            f"{whole / 1e6:.1f} MB if no layer had a window",
            flush=True,
        )
        status |= not 0.95 <= found / counted <= 1.05
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
