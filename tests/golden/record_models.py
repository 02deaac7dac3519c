"""Records what transformers computes for the tiny models of tests/models/cases.py.

    python -m tests.golden.record_models        (torch and transformers needed; writes models.npz beside this file)

Stored for each case: its config (as JSON, so that a test sees when it no longer matches), and float32 logits. Cases
whose config has not changed stay as they are.
"""

import json
import pathlib

import numpy as np

from lockstep.new_files import scratch_folder
from tests.models.cases import CASES, SEED
from tests.models.tiny import prompt, tensors, write

NUM_TOKENS = 40
GOLDEN = pathlib.Path(__file__).with_name("models.npz")


def record(folder, config):
    """(config as JSON, logits) of one case."""
    from tests.oracles.hugging_face import logits

    write(folder, config, tensors(config, SEED))
    return json.dumps(config), logits(folder, prompt(config, NUM_TOKENS))


def main():
    arrays = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
    for name, config in CASES.items():
        if str(arrays.get(f"{name}.config")) == json.dumps(config):
            continue
        with scratch_folder() as folder:
            arrays[f"{name}.config"], arrays[f"{name}.logits"] = record(folder, config)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(CASES)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
