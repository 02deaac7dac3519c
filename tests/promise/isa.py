"""Prints a digest of a tiny model's logits and cache; run once for each target: python -m tests.promise.isa."""
import pathlib
import tempfile

from lockstep.parity import Path, run_path
from lockstep.runtime.kernel import target
from tests.models import tiny
from tests.promise.models import Case, load

CASE = Case("qwen3_5", "q8_0", "bf16")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = load(CASE, pathlib.Path(folder))
        ids = tiny.prompt(model.checkpoint.config, 40)
        print(target()[1], run_path(model, ids, Path("cut after 33", (33, 40), 2)).digest)
