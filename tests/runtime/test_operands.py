"""Declarations of ops: wrong operands are errors while recording, and kernels read the fields that were written."""

from typing import ClassVar

import numpy as np
import pytest

from lockstep.native.kernel import kernel
from lockstep.native.simd import poke
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import (
    MAX_WORDS,
    Declaration,
    Operands,
    WeightArrays,
    cache,
    constant,
    output,
    packed,
    rows,
    setting,
    table,
)
from lockstep.runtime.program import CacheArray, Program, Setting, Table, Tensor, Weight
from lockstep.runtime.step import OPERANDS, ROW_WORDS, StepBlock
from tests.ops.harness import ragged_step, run_op, weight


class Everything(Operands):
    """An op with one operand of each role."""

    rules = ("width % 16 == 0",)
    out: Tensor = output("2 * width")
    spare: Tensor = output("8", dtype="i32", scratch=True)
    x: Tensor = rows("width")
    gate: Tensor | None = rows("width", optional=True)
    small: Weight = constant("width, 2")
    large: Weight = packed("4, width")
    angles: Table = table("width // 2")
    grids: Setting = setting("2, 4")
    pages: CacheArray = cache("2, width", kind="pages", dtype="f32")
    width: int
    scale: float
    shift: float
    sharp: bool
    dtype: str = "f32"

    def check(self):
        if self.scale == self.shift:
            raise ValueError("Everything: scale and shift are the same")


PART = np.ones((4, 16), np.float32)


def operands(**changed):
    program = Program()
    tensor = lambda name, width, dtype="f32": program.tensor(name, "T", width, dtype)
    fields = dict(
        out=tensor("out", 32),
        spare=tensor("spare", 8, "i32"),
        x=tensor("x", 16),
        small=Weight("small", "f32", (16, 2), ()),
        large=Weight("large", "f32", (4, 16), ()),
        angles=Table("angles", np.zeros((5, 8), np.float32), None),
        grids=Setting("grids", np.zeros((2, 4), np.float32)),
        pages=CacheArray("pages", "pages", "f32", (2, 16)),
        width=16,
        scale=0.5,
        shift=2.0,
        sharp=True,
    )
    return fields | changed


def test_an_op_knows_its_parts():
    op = Everything(**operands())
    assert [t.name for t in op.outputs] == ["out", "spare"] and [t.name for t in op.kept] == ["out"]
    assert [v.name for v in op.inputs] == ["x", "small", "large", "angles", "grids", "pages"]
    assert op.params == dict(width=16, scale=0.5, shift=2.0, sharp=True) and (op.kind, op.rows) == ("everything", "T")
    assert op.changed(scale=1.0).scale == 1.0 and op.scale == 0.5
    assert str(op) == "out f32[T, 32], spare i32[T, 8] = everything(x, small, large, angles, grids, pages)"


WRONG = [
    (dict(scael=1.0), "there is no operand 'scael'; it has out, spare, x"),
    (dict(scale=1), "scale is 1, expected a float"),
    (dict(scale="1"), "scale is '1', expected a float"),
    (dict(width=16.0), "width is 16.0, expected an integer"),
    (dict(width=True), "width is True, expected an integer"),
    (dict(sharp=1), "sharp is 1, expected True or False"),
    (dict(width=32), r"out \(out\) is 32 wide, expected 64 \(2 \* width\)"),
    (dict(x=Tensor("h", "T", 20)), r"x \(h\) is 20 wide, expected 16 \(width\)"),
    (dict(x=Tensor("h", "T", 16, "i32")), r"x is h i32\[T, 16\], expected f32"),
    (dict(x=Weight("w", "f32", (16,), ())), "x is a Weight, expected a Tensor"),
    (dict(x=None), "x is a NoneType, expected a Tensor"),
    (dict(gate=Tensor("g", "T", 17)), r"gate \(g\) is 17 wide"),
    (dict(small=Weight("w", "f32", (2, 16), ())), r"small \(w\) is 2 x 16 wide, expected 16 x 2 \(width, 2\)"),
    (dict(large=Weight("w", "f32", (16, 16), ())), r"large \(w\) is 16 x 16 wide, expected 4 x 16"),
    (dict(angles=Table("t", np.zeros((5, 9), np.float32), None)), r"angles \(t\) is 9 wide, expected 8"),
    (dict(angles=Table("t", np.zeros((5, 8)), None)), "angles is a table of float64, expected float32"),
    (dict(grids=Setting("g", np.zeros((2, 3), np.float32))), r"grids \(g\) is 2 x 3 wide, expected 2 x 4 \(2, 4\)"),
    (dict(grids=Setting("g", np.zeros((2, 4)))), "grids is a setting of float64, expected rows"),
    (dict(grids=Setting("g", np.zeros((4, 2), np.float32).T)), "grids is a setting of float32, expected rows"),
    (dict(x=Tensor("h", "R", 16)), r"x is h f32\[R, 16\], expected rows T as of out"),
    (dict(spare=Tensor("s", "S", 8, "i32")), r"spare is s i32\[S, 8\], expected rows T as of out"),
    (dict(pages=CacheArray("c", "state", "f32", (2, 16))), "pages is a cache of state, expected pages"),
    (dict(pages=CacheArray("c", "pages", "i8", (2, 16))), "pages is .*, expected f32"),
    (dict(width=18), "expected width % 16 == 0, got width 18"),
    (dict(width=-16), r"width is -16, expected an integer from 0 to 2\*\*63 - 1"),
    (dict(pages=CacheArray("c", "pages", "f32", (3, 16))), r"pages \(c\) is 3 x 16 wide, expected 2 x 16"),
    (dict(shift=0.5), "scale and shift are the same"),
]


@pytest.mark.parametrize("changed, message", WRONG)
def test_a_wrong_operand_is_an_error_while_recording(changed, message):
    with pytest.raises(ValueError, match=f"Everything: {message}"):
        Everything(**operands(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 2**63}, r"width is 9223372036854775808, expected an integer from 0 to 2\*\*63 - 1"),
        ({"scale": 1e300}, r"scale is 1e\+300, expected a finite float of 32 bits"),
        ({"scale": float("nan")}, "scale is nan, expected a finite float of 32 bits"),
        ({"shift": float("-inf")}, "shift is -inf, expected a finite float of 32 bits"),
    ],
)
def test_a_number_that_a_row_cannot_hold_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Everything(**operands(**changed))


def test_an_output_is_an_input_only_where_that_is_declared():
    x = Tensor("x", "T", 16)
    assert Add(out=x, x=x, y=x, width=16).out is x
    with pytest.raises(ValueError, match=r"RmsNorm: x is x f32\[T, 16\], which the op writes; it cannot work in place"):
        RmsNorm(out=x, x=x, weight=Weight("w", "f32", (16,), ()), width=16, eps=1e-6, offset=0.0)


def declare(**fields):
    """A declaration made of a class body."""
    annotations = {name: annotation for name, (annotation, _) in fields.items()}
    values = {name: value for name, (_, value) in fields.items() if value is not None}
    return Declaration("Made", (Operands,), dict(__annotations__=annotations, __module__=__name__) | values)


OUT = (Tensor, output("width"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(out=(Tensor, output("widht"))), "'widht' of out names widht, which is no parameter"),
        (dict(out=(Tensor, output("width *"))), "'width [*]' of out cannot be read"),
        (dict(out=OUT, rules=(ClassVar, ("top < width",))), "'top < width' of a rule names top, which is no parameter"),
        (dict(out=OUT, limit=(np.float32, None)), "limit is declared as .*float32.*, expected int, float, bool or str"),
        (dict(out=OUT, x=(Tensor, None)), "x is declared as .*Tensor.*, expected int, float, bool or str"),
        (dict(out=OUT, x=(int, rows())), "x is declared as .*int.*, expected Tensor"),
        (dict(out=(Weight, output("width"))), "out is declared as .*Weight.*, expected Tensor"),
        (dict(out=OUT, params=(int, None)), "an operand cannot be named 'params', which every op has"),
        (dict(out=OUT, read=(int, None)), "an operand cannot be named 'read', which every op has"),
        (dict(out=OUT, group=(ClassVar, "elementwize")), "group is 'elementwize', expected None or one of linear, att"),
        (dict(out=OUT, **{f"n{i}": (int, None) for i in range(60)}), "62 words, expected at most 43"),
    ],
)
def test_a_wrong_declaration_is_refused_when_it_is_made(fields, message):
    with pytest.raises(ValueError, match=f"Made: {message}"):
        declare(**fields, width=(int, None))


def test_a_row_has_as_many_words_as_a_declaration_may():
    assert MAX_WORDS == ROW_WORDS - OPERANDS


def test_an_operand_that_is_missing_or_given_by_position_is_an_error():
    fields = operands()
    del fields["shift"]
    with pytest.raises(ValueError, match="Everything: operand 'shift' is missing; it has out"):
        Everything(**fields)
    with pytest.raises(ValueError, match="Everything: operands are given by name"):
        Everything(fields["out"])


@kernel
def write_fields(op, step, thread, num_threads):
    """Writes the fields that it reads."""
    a, s = Everything.read(op), StepBlock.read(step)
    if thread == 0:
        for at, number in enumerate((a.scale, a.shift)):
            poke(a.out + 4 * at, number)
        for at, number in enumerate((a.width, a.sharp, a.gate, a.large.dmin, s.num_tokens, s.num_requests)):
            poke(a.out + 8 + 8 * at, number)
        for at, address in enumerate(
            (a.x, a.small, a.large.codes, a.large.d, a.angles, a.grids, a.pages, s.context_len)
        ):
            poke(a.out + 56 + 8 * at, 1 if address != 0 else 0)


def test_a_kernel_reads_the_declared_fields():
    layout = Layout("two arrays", lambda w: (np.ones(4, np.float32), np.ones(4, np.float32)), ("codes", "d"))
    step, _held = ragged_step([3])
    given = dict(
        x=np.ones((3, 16), np.float32),
        small=np.ones((16, 2), np.float32),
        large=weight(PART, "large"),
        angles=np.ones((4, 8), np.float32),
        grids=np.ones((2, 4), np.float32),
        pages=np.ones((1, 2, 16), np.float32),
    )
    numbers = dict(width=16, scale=0.5, shift=2.0, sharp=True)
    out = run_op(Implementation(write_fields, layout), Everything, step=step, **given, **numbers)["out"]
    assert out[0, :2].tolist() == [0.5, 2.0]
    assert out.view(np.int64).reshape(-1)[1:7].tolist() == [16, 1, 0, 0, 3, 1]
    assert out.view(np.int64).reshape(-1)[7:15].tolist() == [1] * 8


def test_words_of_fields_do_not_overlap_and_fit_a_row():
    words = Everything.words()
    ends = [w.index + (len(WeightArrays._fields) if w.kind == "weight" else 1) for w in words]
    assert [w.index for w in words] == [0, *ends[:-1]]
    assert "dtype" not in {w.name for w in words}
