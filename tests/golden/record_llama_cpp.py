"""Records what llama.cpp computes for tiny GGUF files in float32, one for each architecture that it has.

    python -m tests.golden.record_llama_cpp CYLLAMA LLAMA_CPP        (writes llama_cpp.npz beside this file)

CYLLAMA, LLAMA_CPP: interpreters: one with cyllama, which records Qwen's files, and one with llama-cpp-python.
Stored for each file: the hash of its header (so that a test sees when it no longer matches), and float32 logits.
"""

import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np

from lockstep.new_files import scratch_folder
from lockstep.weights.gguf.file import open_file
from tests.models import tiny
from tests.models.cases import CASES
from tests.oracles import __file__ as oracles
from tests.weights.gguf import test_gguf_dense as dense
from tests.weights.gguf import test_gguf_qwen3next as qwen3next
from tests.weights.gguf import test_gguf_qwen35moe as qwen35moe
from tests.weights.gguf import test_gguf_vision as vision

GOLDEN = pathlib.Path(__file__).with_name("llama_cpp.npz")
CYLLAMA, LLAMA_CPP = (pathlib.Path(oracles).with_name(f"{name}_logits.py") for name in ("cyllama", "llama_cpp"))
VOCABULARY, NUM_TOKENS = 96, 40
IDS = np.random.RandomState(4).randint(0, VOCABULARY, NUM_TOKENS).tolist()


def seeing(name: str, **changes: float) -> Callable[[pathlib.Path], pathlib.Path]:
    """Writes the text part of a model that also sees. changes: of its config."""

    def write(path: pathlib.Path) -> pathlib.Path:
        config = vision.all_with_experts(name) | changes
        return vision.write_vision(path, config, tiny.tensors(config, 3), *vision.FILES[name])

    return write


def dense_file(case: str) -> Callable[[pathlib.Path], pathlib.Path]:
    """Writes a case of `test_gguf_dense.py` with what llama.cpp wants to be told of a vocabulary."""
    keys = dict(tokenizer__ggml__model="no_vocab", vocab_size=VOCABULARY)
    return lambda path: dense.BY_CASE[case].write(path, tiny.tensors(CASES[case], 3), **keys)


# Not among them: Gemma, whose gelu is a table of float16 there (tiny files of Gemma 2 and 3 differ by 0.002), and which
# is not loaded in tiny sizes from 3n on, nor gpt-oss; a Phi with a window, which llama.cpp switches off.
BY_LLAMA_CPP = {
    case: dense_file(case)
    for case in ("granite", "granitemoe", "ministral3", "olmo2", "olmo3", "phi3_long", "seed_oss")
}
FILES: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "qwen35moe": lambda path: qwen35moe.write_qwen35moe(path, tiny.tensors(qwen35moe.CONFIG, 3)),
    "qwen35moe gate_up": lambda path: qwen35moe.write_qwen35moe(path, tiny.tensors(qwen35moe.CONFIG, 3), True),
    "qwen3next": lambda path: qwen3next.write_qwen3next(path, tiny.tensors(qwen3next.CONFIG, 3)),
    "qwen3next ssm_in": lambda path: qwen3next.write_qwen3next(path, tiny.tensors(qwen3next.CONFIG, 3), True),
    # llama.cpp b9190 takes 0 for the eps of qwen2vl, whatever the file says
    "qwen2vl": seeing("qwen2_vl", rms_norm_eps=1e-9),
    "qwen3vl": seeing("qwen3_vl"),
    "qwen3vlmoe": seeing("qwen3_vl_moe"),
    **BY_LLAMA_CPP,
}


def main() -> None:
    arrays = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
    with scratch_folder() as folder:
        for name, write in FILES.items():
            path, out = write(folder / "m.gguf"), folder / "logits.npy"
            header = open_file(path).header_hash
            if str(arrays.get(f"{name}.header")) != header:
                by_cyllama = [sys.argv[1], CYLLAMA, path, out, VOCABULARY, *IDS]
                by_llama_cpp = [sys.argv[2], LLAMA_CPP, path, out, "--float32", *IDS]
                words = by_llama_cpp if name in BY_LLAMA_CPP else by_cyllama
                subprocess.run([str(word) for word in words], check=True)
                arrays |= {f"{name}.header": np.array(header), f"{name}.logits": np.load(out)}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(FILES)} files, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
