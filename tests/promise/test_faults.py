"""A wrong bit in any op makes the promise's tests fail, and parity names the op. If not, neither would prove
anything."""

import numpy as np
import pytest

from lockstep.lab.parity import Path, compare, first_difference, run_path
from lockstep.ops import BACKENDS
from lockstep.ops.rewrite import RECORDED_KINDS
from tests.promise.faults import faulty, places
from tests.promise.models import Case, library, load
from tests.promise.schedule import Differs, Teams, Walk, limits

CASES = [
    Case("qwen3_5", "q8_0", "bf16"),
    Case("qwen3_5", "f32", "f32"),
    Case("qwen3_5", "bf16", "bf16"),
    Case("mistral_window", "q4_0", "bf16"),
    Case("qwen2", "f32", "f32"),
    Case("qwen3_5", "q4_0", "q8"),
    Case("mistral_window", "bf16", "q8"),
    Case("gemma3", "q8_0", "bf16"),
    Case("qwen3_5_moe", "f32", "bf16"),
    Case("gemma4", "f32", "f32"),
    Case("gemma2", "f32", "f32"),
]
LENGTHS = (9, 70)
PROMPT = np.random.RandomState(5).randint(0, 90, 20).tolist()


@pytest.fixture(scope="module")
def teams():
    made = Teams()
    yield made
    made.close()


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny"))


def outputs(program):
    """The outputs of an op that other ops may read."""
    return places(program, lambda op: op.shared)


def plant(monkeypatch, model, kind, operand, word):
    """A backend "faulty" whose only op writes a wrong bit; the swaps that choose it. Its form that verifies drafts,
    which a swap chooses with it, does not run here."""
    table = model.backend()
    verifying = {k: table[k] for k, recorded in RECORDED_KINDS.items() if recorded == kind}
    monkeypatch.setitem(BACKENDS, "faulty", {kind: faulty(table[kind], word), **verifying})
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
    missed = [
        planted
        for planted in outputs(program)
        if not walk_differs(model, sequences, teams, fused=fused, swaps=plant(monkeypatch, model, *planted))
    ]
    assert not missed


# several steps: a wrong query or decay at position 0 has nothing to act on
PATH = Path("chunks of 7", (7, 14, len(PROMPT)), 1)


def test_parity_turns_red_and_names_the_op(model, monkeypatch):
    tables, reference = [("cpu", {}), ("cpu", {})], run_path(model, PROMPT, PATH)
    assert first_difference(model, PROMPT, tables, 2) is None
    assert compare(reference, PATH, run_path(model, PROMPT, PATH)).identical
    fused = {op.kind for op in model.program.ops}
    for kind, operand, word in outputs(model.rewritten(model.backend(), fused=False)):
        swaps = plant(monkeypatch, model, kind, operand, word)
        found = first_difference(model, PROMPT, [("cpu", {}), ("cpu", swaps)], 2)
        assert found is not None and found.op.kind == kind and found.tensor is getattr(found.op, operand), (kind, found)
        assert (found.row, found.num_different) == (0, 1), (kind, found)
        if kind in fused - {"adjust_logits"} and (kind != "sample" or found.tensor.name in ("token", "logprob")):
            compared = compare(reference, PATH, run_path(model, PROMPT, PATH, swaps))
            assert not compared.identical, (kind, operand)
            assert kind != "sample" or compared.differing == ("tokens",)


def cache_writes(program):
    """(kind of op, operand, its word, cache name) of every cache array, at the op that writes it: the first that has
    it."""
    writers = {}
    for op in program.ops:
        for word in op.words():
            value = getattr(op, word.name)
            if value in op.caches:
                writers.setdefault(value.name, (op.kind, word.name, word.index, value.name))
    return list(writers.values())


def test_a_wrong_cache_write_is_named_at_the_op_that_wrote_it(model, monkeypatch):
    """Every kind of write to a cache, one at a time: also of state that only the next step reads."""
    reference, tried = run_path(model, PROMPT, PATH), set()
    for kind, operand, word, name in cache_writes(model.rewritten(model.backend(), fused=False)):
        if (kind, operand) in tried:
            continue
        tried.add((kind, operand))
        swaps = plant(monkeypatch, model, kind, operand, word)
        found = first_difference(model, PROMPT, [("cpu", {}), ("cpu", swaps)], 2)
        assert found is not None and (found.op.kind, found.tensor.name) == (kind, name), (name, found)
        # the fourth byte is the upper half of bfloat16 number 1 or of float32 number 0, or int8 number 3
        number = {"f32": 0, "bf16": 1, "i8": 3}[found.tensor.dtype]
        expected = (number, 0) if name.endswith("v_pages") else (0, number)
        assert (found.row, found.column, found.num_different) == (*expected, 1), (name, found)
        assert abs(found.values[0] - found.values[1]) == (128 if number == 3 else 2 * abs(found.values[0]))
        assert name in compare(reference, PATH, run_path(model, PROMPT, PATH, swaps)).differing
    assert tried
