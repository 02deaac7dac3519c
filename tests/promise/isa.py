"""Prints digests of tiny models' logits and caches, to be run once for each target: python -m tests.promise.isa."""

from lockstep.lab.parity import Path, run_path
from lockstep.native.kernel import target
from lockstep.new_files import scratch_folder
from tests.models import tiny
from tests.promise.models import Case, load

CASES = Case("qwen3_5", "q8_0", "bf16"), Case("qwen3_5", "q8_0", "q8"), Case("qwen3_5_moe", "q8_0", "bf16")


def digest(case, folder):
    """The digest of one model's logits and caches on a prompt that is cut into two steps."""
    model = load(case, folder)
    ids = tiny.prompt(model.checkpoint.config, 40)
    return run_path(model, ids, Path("cut after 33", (33, 40), 2)).digest


def digests():
    """The digest of each case."""
    with scratch_folder() as folder:
        return [digest(case, folder / str(case)) for case in CASES]


if __name__ == "__main__":
    print(target()[1], *digests())
