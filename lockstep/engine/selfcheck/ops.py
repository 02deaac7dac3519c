"""Probes of ops that no made-up model has: gated delta rules over drafts, block-diagonal layers, layers in integer
arithmetic, scores, attention on grids, concatenated tensors, and columns in another order.

The ops compute on rows of a made-up table. Caches have digests, too: the records that a step makes of its drafts are
read by a later step.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.model import emit_sampling
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.selfcheck.rounded import KINDS as ROUNDED_KINDS
from lockstep.engine.selfcheck.rounded import rounded_rows
from lockstep.engine.selfcheck.sampling import ProbeModel
from lockstep.engine.selfcheck.weights import constant, rows_of, stored
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.concat import Concat
from lockstep.ops.elementwise.select_columns import SelectColumns
from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.ops.integer.code_fixed import CodeFixed
from lockstep.ops.integer.code_linear import CodeLinear
from lockstep.ops.integer.code_rows import CodeRows, row_width
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.integer.code_weights import code_tensor, code_weight
from lockstep.ops.linear.grouped_linear import GroupedLinear
from lockstep.ops.linear.linear import PREPARATION
from lockstep.ops.linear.moe import Route
from lockstep.ops.recurrent.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify
from lockstep.ops.rewrite import fuse, lower, verifying
from lockstep.ops.rounded.grids import INTEGER
from lockstep.ops.sampling.score import Score, scratch_width
from lockstep.runtime.backend import OpTable
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight
from lockstep.runtime.threads import Team
from lockstep.weights.tensor import StoredTensor

ROWS, MOST_DRAFTS = 64, 3  # rows of a step; drafts of a request in a step
# of one step, for each of two requests: (known tokens, drafts after them, right drafts of the step before)
Counts = Sequence[tuple[int, int, int]]
DRAFT_STEPS: tuple[Counts, ...] = (
    ((37, 3, 0), (9, 0, 0)),  # more than a tile with drafts, beside a request without drafts
    ((1, 3, 2), (1, 2, 0)),
    ((1, 3, 3), (1, 1, 1)),  # the ring buffer and the records wrap around
    ((1, 0, 0), (2, 0, 0)),
)
ROW_STEPS: tuple[Counts, ...] = (((61, 0, 0), (3, 0, 0)), ((5, 0, 0), (1, 0, 0)), ((1, 0, 0), (1, 0, 0)))


@dataclass(frozen=True)
class OpProbe:
    """A program of few ops, made by `program`, and the steps that it runs. kinds: the ops whose outputs have
    digests."""

    name: str
    program: Callable[[], Program]
    steps: tuple[Counts, ...]
    kinds: tuple[type[Operands], ...]

    def __str__(self) -> str:
        return self.name


def drafts_program() -> Program:
    """A gated delta rule with 5 blocks of value columns, whose projected inputs are the table's rows."""
    G, H, K, V, J = 2, 4, 32, 80, 4
    C = 2 * G * K + H * V
    values = np.random.RandomState(6).randint(-4096, 4096, (2 * ROWS, C + 32)) * np.float32(2.0**-11)
    program, heads = Program(), dict(num_k_heads=G, k_head_dim=K, num_v_heads=H)
    x, taps = rows_of(program, "drafts.rows", values.astype(np.float32)), stored("drafts.conv1d", (C, 1, J), "f32")
    inputs = DeltaInputs(
        out=program.tensor("conv", "T", C),
        gates=program.tensor("gates", "T", 2 * H),
        x=x,
        weight=Weight(taps.name, "f32", (C, J), (taps,)),
        a_log=constant("drafts.a_log", H),
        dt_bias=constant("drafts.dt_bias", H),
        state=program.cache("conv_state", "state", "f32", (J - 1, C)),
        **dict(row_width=x.width, offset=0, channels=C, conv_width=J, a_offset=C + 16, b_offset=C, **heads),
    )
    qkv = program.emit(inputs)
    rule = GatedDelta(
        out=program.tensor("heads", "T", H * V),
        **dict(qk=qkv, v=qkv, gates=inputs.gates),
        state=program.cache("state", "state", "f32", (H, V // 16, K, 16)),
        **dict(qk_width=C, v_width=C, v_offset=2 * G * K, v_head_dim=V, **heads),
    )
    return verifying(_ended(program, program.emit(rule)), MOST_DRAFTS)


def grouped_program(format: str) -> Program:
    """A block-diagonal layer of two groups in a weight format, and a residual addition."""
    groups, K, N = 2, 256, 512
    values = np.random.RandomState(7).randint(-4096, 4096, (2 * ROWS, groups * K)) * np.float32(2.0**-11)
    program, part = Program(), stored(f"grouped {format}", (N, K), format)
    x = rows_of(program, "grouped.rows", values.astype(np.float32))
    layer = GroupedLinear(
        out=program.tensor("grouped", "T", N),
        x=x,
        weight=Weight(part.name, format, (N, K), (part,)),
        **dict(in_features=K, out_features=N, groups=groups, width=N, column=0),
    )
    y = program.emit(layer)
    return _ended(program, program.emit(Add(out=program.tensor("grouped.residual", "T", N), x=x, y=y, width=N)))


def concat_program() -> Program:
    """Two concatenated tensors."""
    program, tensors = Program(), {}
    for name, width in (("first", 48), ("second", 16)):
        values = np.random.RandomState(width).randint(-4096, 4096, (2 * ROWS, width)) * np.float32(2.0**-11)
        tensors[name] = rows_of(program, f"concat.{name}", values.astype(np.float32))
    widths = {f"{name}_width": tensor.width for name, tensor in tensors.items()}
    return _ended(program, program.emit(Concat(out=program.tensor("concat", "T", 64), **tensors, **widths)))


def columns_program() -> Program:
    """The columns of a tensor in another order."""
    program, width, random = Program(), 96, np.random.RandomState(12)
    values = random.randint(-4096, 4096, (2 * ROWS, width)) * np.float32(2.0**-11)
    x, order = rows_of(program, "columns.rows", values.astype(np.float32)), random.permutation(width)
    tensor = StoredTensor("columns.order", "i32", (1, width), order.astype(np.int32).reshape(1, -1))
    out, weight = program.tensor("columns", "T", width), Weight(tensor.name, "i32", tensor.shape, (tensor,))
    return _ended(program, program.emit(SelectColumns(out=out, x=x, order=weight, width=width)))


def integer_program() -> Program:
    """Two layers in integer arithmetic, on rows of 8-bit codes (one plane) and of 16-bit codes (two planes)."""
    K, N, ends = 256, 48, {"u8": (0, 255), "i16": (-32768, 32767)}
    values = np.random.RandomState(8).randint(-4096, 4096, (2 * ROWS, K)) * np.float32(2.0**-11)
    program, outs, draw = Program(), [], np.random.RandomState(9).randint
    x = rows_of(program, "integers.rows", values.astype(np.float32))
    for name, (low, high) in ends.items():
        scale, zero = np.float32(4 / (high - low)), (low + high) // 2
        grid = np.array([[INTEGER, scale, np.float32(1) / scale, zero, low, high, 0, 0]], np.float32)
        coded = program.tensor(f"{name}.codes", "T", row_width(K), "i8")
        program.emit(CodeRows(out=coded, x=x, grid=Setting(name, grid), width=K))
        codes, scales = draw(0, 256, (N, K)), (draw(1, 256, N) * np.float32(2.0**-16)).astype(np.float32)
        weight = code_weight(f"integers.{name}", code_tensor(name, codes, scales, draw(0, 256, N)))
        out, sizes = program.tensor(name, "T", N), dict(in_features=K, out_features=N, width=N, column=0)
        outs.append(program.emit(CodeLinear(out=out, x=coded, weight=weight, **sizes)))
        on_grid, fixed = program.tensor(f"{name}.fixed", "T", N), Setting(f"{name}.fixed", grid)
        program.emit(CodeFixed(out=on_grid, x=coded, weight=weight, grid=fixed, **sizes))
    both = Add(out=program.tensor("both", "T", N), x=outs[0], y=outs[1], width=N)
    return _ended(program, program.emit(both))


def score_program(format: str) -> Program:
    """Scores of a head in a weight format: on a grid without a base, with a base in the format, and with one in
    float32."""
    K, V, program = 256, 4100, Program()
    values = np.random.RandomState(10).randint(-4096, 4096, (2 * ROWS, K)) * np.float32(2.0**-11)
    x = rows_of(program, "scored.rows", values.astype(np.float32))
    base = program.emit(Add(out=program.tensor("base", "T", K), x=x, y=x, width=K))
    target, weights = program.tensor("target", "T", 1, "i32"), program.tensor("target.weight", "T", 1)
    routed = dict(num_experts=K, top_k=1, renormalise=False, width=K)
    program.emit(Route(expert_ids=target, weights=weights, logits=x, **routed))
    head, plain = _head(format, V, K), _head("f32", V, K)
    coded, coded_base = (_coded(program, rows) if format == CODES else rows for rows in (x, base))
    grid = np.array([[INTEGER, 0.125, 8, 3, -128, 127, 0, 0]], np.float32)
    operands: dict[str, dict[str, Any]] = {
        "alone": dict(grid=Setting("grid", grid)),
        "same": dict(base_x=coded_base, base_weight=head),
        "f32": dict(base_x=base, base_weight=plain, base_f32=format != "f32"),
    }
    for name, each in operands.items():
        out, scratch = (program.tensor(f"{name}{suffix}", "T", n) for suffix, n in (("", 8), (".s", scratch_width(V))))
        sizes = dict(in_features=K, vocab_size=V, scratch_width=scratch_width(V))
        program.emit(Score(out=out, scratch=scratch, x=coded, weight=head, target=target, **sizes, **each))
    return _ended(program, x)


def _head(format: str, V: int, K: int) -> Weight:
    """A made-up head."""
    if format != CODES:
        part = stored(f"head {format}", (V, K), format)
        return Weight(part.name, part.format, (V, K), (part,))
    draw = np.random.RandomState(11).randint
    scales = (draw(1, 256, V) * np.float32(2.0**-18)).astype(np.float32)
    return code_weight("head", code_tensor("head", draw(0, 256, (V, K)), scales, draw(0, 256, V)))


def _coded(program: Program, x: Tensor) -> Tensor:
    """Rows of codes of 16 bits."""
    out = program.tensor(f"{x.name}.codes", "T", row_width(x.width), "i8")
    grid = np.array([[INTEGER, 2.0**-13, 2.0**13, 0, -32768, 32767, 0, 0]], np.float32)
    return program.emit(CodeRows(out=out, x=x, grid=Setting(out.name, grid), width=x.width))


def _ended(program: Program, rows: Tensor) -> Program:
    """The program with the choice of a token at its end, which every Runner needs."""
    logits = program.tensor("logits", "R", rows.width)
    program.emit(SelectRows(out=logits, x=rows, width=rows.width, selected=selected_rows("R")))
    emit_sampling(program, logits, rows.width)
    return program


def grouped_probe(format: str) -> OpProbe:
    """The probe of block-diagonal layers whose weights have a format."""
    kinds = (GroupedLinear, Add)
    return OpProbe(f"grouped_linear {format}", partial(grouped_program, format), ROW_STEPS, kinds)


def score_probe(format: str) -> OpProbe:
    """The probe of scores by heads in a format."""
    return OpProbe(f"score {format}", partial(score_program, format), ROW_STEPS, (Score,))


CONCAT = OpProbe("concat", concat_program, ROW_STEPS, (Concat,))
COLUMNS = OpProbe("columns", columns_program, ROW_STEPS, (SelectColumns,))
INTEGERS = OpProbe("integers", integer_program, ROW_STEPS, (CodeRows, CodeLinear, CodeFixed))
ROUNDED = OpProbe("rounded", lambda: _ended(*rounded_rows(2 * ROWS)), ROW_STEPS, ROUNDED_KINDS)
DRAFTS = OpProbe("drafts", drafts_program, DRAFT_STEPS, (DeltaInputsVerify, GatedDeltaVerify))
PLAIN = (DRAFTS, CONCAT, COLUMNS, INTEGERS, ROUNDED)  # the probes without a weight format
HEAD_FORMATS = (*PREPARATION, CODES)


def all_probes() -> list[OpProbe]:
    """All probes of this file."""
    return [*PLAIN, *map(grouped_probe, PREPARATION), *map(score_probe, HEAD_FORMATS)]


def probes(program: Program) -> list[OpProbe]:
    """The probes of the ops that a program has."""
    plain = [probe for probe in PLAIN if any(isinstance(op, probe.kinds) for op in program.ops)]
    formats = {op.weight.format for op in program.ops if isinstance(op, GroupedLinear)}
    heads = {op.weight.format for op in program.ops if isinstance(op, Score)}
    grouped = [grouped_probe(format) for format in PREPARATION if format in formats]
    return plain + grouped + [score_probe(format) for format in HEAD_FORMATS if format in heads]


def probe_model(probe: OpProbe, table: OpTable, fused: bool) -> ProbeModel:
    """The model of a probe, for a Runner."""
    lowered = lower(probe.program())
    return ProbeModel(table, fuse(lowered, table) if fused else lowered, 2 * ROWS)


def digests(probe: OpProbe, table: OpTable, fused: bool = True) -> list[tuple[Operands, str, str]]:
    """[(op, tensor or cache name, digest)] of all outputs of a probe's ops over all its steps, in order."""
    with contextlib.closing(Team(1)) as team:
        limits = Limits(ROWS, 2, 4, 2)
        runner = Runner(probe_model(probe, table, fused), team, limits, keep=True)
        ops = [op for op in runner.program.ops if isinstance(op, probe.kinds)]
        hashes = {(op, value.name): hashlib.sha256() for op in ops for value in (*op.shared, *op.caches)}
        at = [0, 0]
        for counts in probe.steps:
            at = [start + num_right for start, (_, _, num_right) in zip(at, counts, strict=True)]
            runner.step([span(i, start, *each) for i, (start, each) in enumerate(zip(at, counts, strict=True))])
            at = [start + known for start, (known, _, _) in zip(at, counts, strict=True)]
            num_rows = sum(known + drafts for known, drafts, _ in counts)
            for op in ops:
                for tensor in op.shared:
                    hashes[op, tensor.name].update(runner.executor.view(tensor, num_rows).tobytes())
                for cache in op.caches:
                    hashes[op, cache.name].update(runner.caches[cache.name].tobytes())
        return [(op, name, digest.hexdigest()[:16]) for (op, name), digest in hashes.items()]


def span(index: int, start: int, known: int, drafts: int, num_right: int) -> Span:
    """The Span of a probe's request from position `start` on; drafts have other token ids than known tokens. num_right:
    how many drafts of the step before were right."""
    ids = [(7 * p * p + 13 * index + 3) % ROWS for p in range(start, start + known)]
    ids += [ROWS + (5 * p + start + index) % ROWS for p in range(start + known, start + known + drafts)]
    return Span(ids, start, everywhere([]), index, {len(ids) - 1: {}}, num_drafts=drafts, num_pending=num_right)
