"""Rows without an output are dropped before the first linear layer after the last op that mixes tokens."""

import pytest

from lockstep.models.registry import FAMILIES
from lockstep.models.shapes import AnyTensor
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.select_rows import SelectRows
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.output_rows import output_rows_only
from lockstep.runtime.program import Program, Weight
from tests.models.cases import hybrid

TINY = {name: family.tiny for name, family in FAMILIES.items() if family.tiny}
TINY["ends with a gated delta rule"] = hybrid(layer_types=["full_attention"] * 3 + ["linear_attention"])


def recorded(config):
    """(the program as recorded, the program after `output_rows_only`)."""
    ops, family = AnyTensor(), next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)
    family.record(ops, family.read(config))
    return ops.program, output_rows_only(ops.program)


@pytest.mark.parametrize("name", TINY)
def test_the_last_mixer_is_the_last_op_on_all_rows(name):
    plain, program = recorded(TINY[name])
    assert "O" not in {op.rows for op in plain.ops}
    first = next(i for i, op in enumerate(program.ops) if op.rows == "O")
    before, after = program.ops[:first], program.ops[first:]
    assert before == plain.ops[:first] and {op.rows for op in after} == {"O", "R", "E"}
    assert all(op.x in before[-1].outputs or op.x.name in ("embed", after[1].x.name) for op in after[:2])
    # a last layer may read an embedding of its own; of Gemma 3n it reads four streams, too, and their normed first one
    num_copies = {"gemma4": 3, "gemma3n": 7}.get(name, 2)
    assert [type(op) for op in after[num_copies:]] == [type(op) for op in plain.ops[first:]]
    assert isinstance(after[num_copies], Linear) and not any(isinstance(op, Linear) and op.rows == "T" for op in after)
    layer = after[num_copies].out.name.rpartition(".")[0].rpartition(".")[0]
    part, other = "norm" if "delta" in name else "heads", "input_layernorm" if name == "gemma3n" else "residual"
    assert [op.out.name for op in after[:2]] == [f"{layer}.{part}.output", f"{layer}.{other}.output"]


def rows_twice():
    """A program of a linear layer and an addition, on rows that are given."""
    program, K = Program(), 32
    x = program.give("x", "T", K)
    part = AnyTensor().stored("w", K, K)
    weight = Weight("w", "f32", (K, K), (part,))
    sizes = dict(in_features=K, out_features=K, width=K, column=0)
    y = program.emit(Linear(out=program.tensor("y", "T", K), x=x, weight=weight, **sizes))
    z = program.emit(Add(out=program.tensor("z", "T", K), x=x, y=y, width=K))
    return program, x, z


def test_without_a_mixer_rows_end_before_the_first_linear_layer():
    program, x, _ = rows_twice()
    rewritten = output_rows_only(program)
    copy, linear, add = rewritten.ops
    assert [op.rows for op in rewritten.ops] == ["O"] * 3 and isinstance(copy, SelectRows) and copy.x is x
    assert add.x is linear.x is copy.out  # copied once, read twice


def test_all_rows_go_on_where_they_are_a_result():
    program, _, z = rows_twice()
    program.results["all"] = z
    assert output_rows_only(program) is program
