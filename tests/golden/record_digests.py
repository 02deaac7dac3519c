"""Records tests/golden/digests.json: python -m tests.golden.record_digests

SHA-256 of the bundled model's logits on a fixed prompt, for every weight format, and of the model's weights. The file
changes only with a decision: new weights, or other bits together with a new NUMERICS version.
"""

import hashlib
import json
import pathlib

from lockstep.engine.model import load_model
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.lab.parity import Path, run_path
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import WeightStore

GOLDEN = pathlib.Path(__file__).with_name("digests.json")
FORMATS = ("auto", "f32", "q8_0", "q4_0")
PROMPT = [(37 * i * i + 11 * i + 5) % 4096 for i in range(64)]


def weights_digest():
    """SHA-256 of the bundled model's weights file."""
    return hashlib.sha256((resolve_model(None) / "model.safetensors").read_bytes()).hexdigest()


def logits_digest(weights, kv_dtype=None):
    """SHA-256 of the logits of all positions of the prompt, computed whole on two threads."""
    model = load_model(open_checkpoint(resolve_model(None)), WeightStore(), weights, kv_dtype, max_context=128)
    return hashlib.sha256(run_path(model, PROMPT, Path("whole", (len(PROMPT),), 2)).logits.tobytes()).hexdigest()


def record():
    return {
        "numerics": NUMERICS,
        "weights": weights_digest(),
        "logits": {w: logits_digest(w) for w in FORMATS},
        "logits, q8 cache": {w: logits_digest(w, "q8") for w in FORMATS},
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(record(), indent=1) + "\n")
