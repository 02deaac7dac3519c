"""A wrong bit in any op turns the promise red, and parity names the op. If not, neither proves anything."""
import numpy as np
import pytest

from lockstep.ops import BACKENDS
from lockstep.parity import Path, compare, first_difference, run_path
from tests.promise.faults import faulty
from tests.promise.models import Case, library, load
from tests.promise.schedule import Differs, Teams, Walk, limits

CASES = [Case("qwen3_5", "q8_0", "bf16"), Case("qwen3_5", "f32", "f32"), Case("qwen3_5", "bf16", "bf16"),
         Case("mistral_window", "q4_0", "bf16"), Case("qwen2", "f32", "f32")]
LENGTHS = (9, 70)
PROMPT = np.random.RandomState(5).randint(0, 90, 20).tolist()
UNSEEN = ("scratch", "softmax")  # outputs that only their own kernel reads


@pytest.fixture(scope="module")
def teams():
    made = Teams()
    yield made
    made.close()


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny"))


def outputs(program):
    """(kind, number of the output) for every output of every kind of op."""
    return sorted({(op.kind, i) for op in program.ops for i, t in enumerate(op.outputs) if not t.name.endswith(UNSEEN)})


def plant(monkeypatch, model, kind, output):
    """A backend "faulty" whose only op writes a wrong bit; the swaps that choose it."""
    monkeypatch.setitem(BACKENDS, "faulty", {kind: faulty(model.backend()[kind], output)})
    return {kind: "faulty"}


def walk_differs(model, sequences, teams, **options):
    try:
        Walk(model, sequences, teams, 0, limits(model, 80, 3, 8), **options).run(8)
    except Differs:
        return True
    return False


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_wrong_bit_in_any_op_breaks_the_promise(model, teams, fused, monkeypatch):
    sequences, program = library(model, LENGTHS), model.rewritten(model.backend(), fused)
    assert not walk_differs(model, sequences, teams, fused=fused)
    missed = [planted for planted in outputs(program)
              if not walk_differs(model, sequences, teams, fused=fused, swaps=plant(monkeypatch, model, *planted))]
    assert not missed


def test_parity_turns_red_and_names_the_op(model, monkeypatch):
    # several steps: a wrong query or decay at position 0 has nothing to act on
    path, tables = Path("chunks of 7", (7, 14, len(PROMPT)), 2), [("cpu", {}), ("cpu", {})]
    reference = run_path(model, PROMPT, path)
    assert first_difference(model, PROMPT, tables, 2) is None
    fused = {op.kind for op in model.program.ops}
    for kind, output in outputs(model.rewritten(model.backend(), fused=False)):
        swaps = plant(monkeypatch, model, kind, output)
        found = first_difference(model, PROMPT, [("cpu", {}), ("cpu", swaps)], 2)
        assert found is not None and found.op.kind == kind and found.tensor == found.op.outputs[output], (kind, found)
        assert (found.row, found.num_different) == (0, 1), (kind, found)
        if kind in fused - {"adjust_logits", "sample"}:  # parity compares logits, not what is drawn from them
            assert not compare(reference, path, run_path(model, PROMPT, path, swaps)).identical, (kind, output)
