"""A rounded program and its unrolled twin have the same bits, for all grids, shapes, masks, steps and threads."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from lockstep.ops import BACKENDS
from lockstep.ops.rounded import attention as rounded_attention
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.inputs import K_SITES, Q_SITES, TABLE_SITES, RoundedInputs
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ops.rounded.unrolled_heads import HeadScores, HeadValues, KeepHead, MaskRows, ScaleRows
from lockstep.ptq.unroll import unroll
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.program import Program, Setting, Table
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import ragged_step, same_bits, weight
from tests.ops.rounded.grid_cases import GRIDS, integer
from tests.targets import compiling_for

PAGES = 3  # of a request
REFERENCE, CPU = BACKENDS["reference"], {**BACKENDS["reference"], **BACKENDS["cpu"]}


@dataclass
class Case:
    """Attention and SwiGLU of some requests, step after step, with random grids.

    contexts: the number of tokens of each request. steps: for each step, how many tokens of each request it runs.
    rope_dim: 0, a part or all of head_dim.
    """

    H: int = 4
    G: int = 2
    K: int = 32
    rope_dim: int = 16
    normed: bool = True
    gated: bool = False
    pre_negated: bool = False
    additive: bool = False
    contexts: tuple = (20, 131, 1)
    steps: tuple = ((20, 131, 1),)
    F: int = 33
    seed: int = 0
    scale: float | None = None
    grids: dict = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        H, G, K = self.H, self.G, self.K
        self.stride = 2 * K if self.gated else K
        self.row_width = H * self.stride + 2 * G * K
        self.x = [rng.standard_normal((c, self.row_width), np.float32) for c in self.contexts]
        self.gate_up = [rng.standard_normal((c, 2 * self.F), np.float32) for c in self.contexts]
        angle = rng.uniform(0, 6.2, (PAGES * 64, max(1, self.rope_dim // 2)))
        self.tables = [Table(f.__name__, f(angle).astype(np.float32), None) for f in (np.cos, np.sin)]
        self.norms = [weight(rng.uniform(0.5, 1.5, K), f"{name}.norm") for name in "qk"] if self.normed else [None] * 2
        counts = dict(q=Q_SITES * H, k=K_SITES * G, v=G, rope=len(TABLE_SITES), swiglu=3)
        counts["attention"] = len(rounded_attention.SITES) * H
        for name, count in counts.items():
            if name not in self.grids:
                self.grids[name] = np.stack([GRIDS[word] for word in rng.choice(list(GRIDS), count)])
        self.grids["attention"][3 * H] = integer(1 / 255, 0, 0, 255)  # weights

    def program(self, apart=False, **results):
        """The rounded program; apart: an op between the two halves of attention."""
        program, H, G, K = Program(), self.H, self.G, self.K
        x, gate_up = program.give("x", "T", self.row_width), program.give("gate_up", "T", 2 * self.F)
        pages = dict(
            k_pages=program.cache("k", "pages", "f32", (G, K, 64)),
            v_pages=program.cache("v", "pages", "f32", (G, 64, K)),
        )
        sizes = dict(num_heads=H, num_kv_heads=G, head_dim=K)
        settings = {name: Setting(name, rows) for name, rows in self.grids.items()}
        q = program.emit(
            RoundedInputs(
                q=program.tensor("L0.q", "T", H * K),
                x=x,
                cos=self.tables[0],
                sin=self.tables[1],
                q_norm=self.norms[0],
                k_norm=self.norms[1],
                **{f"{name}_grids": settings[name] for name in ("q", "k", "v", "rope")},
                rope_dim=self.rope_dim,
                row_width=self.row_width,
                q_offset=0,
                q_stride=self.stride,
                k_offset=H * self.stride,
                v_offset=H * self.stride + G * K,
                eps=1e-6,
                norm_offset=0.0,
                pre_negated=self.pre_negated,
                **pages,
                **sizes,
            )
        )
        swiglu = RoundedSiluMul(
            out=program.tensor("L0.act", "T", self.F), x=gate_up, grids=settings["swiglu"], width=self.F
        )
        gate = dict(gate=x, gate_width=self.row_width, gate_offset=K, gate_stride=2 * K) if self.gated else {}
        mask = dict(additive=self.additive, fill=-9.0, max_keys=150)
        attention = RoundedAttention(
            out=program.tensor("L0.heads", "T", H * K),
            q=q,
            grids=settings["attention"],
            scale=K**-0.5 if self.scale is None else self.scale,
            **mask,
            **gate,
            **pages,
            **sizes,
        )
        for op in (swiglu, attention) if apart else (attention, swiglu):
            program.emit(op)
        program.results |= dict(heads=attention.out, act=swiglu.out) | {name: q for name in results}
        return program

    def run(self, program, table=CPU, num_threads=1):
        """{name of a result: [tokens of request 0, of request 1, ...]} and the pages."""
        made, team, most = {}, Team(num_threads), max(map(sum, self.steps))
        pages = [aligned(4 * PAGES * len(self.contexts) * self.G * 64 * self.K) for _ in "kv"]
        places = [aligned(4 * most * width + 64) for width in (self.row_width, 2 * self.F)]
        addresses = [array.ctypes.data for array in pages + places]
        try:
            rows = dict(T=most, S=len(self.contexts), R=len(self.contexts))
            elsewhere = dict(zip(program.given, addresses[2:], strict=True))
            executor = Executor(
                program,
                table,
                team,
                WeightStore(),
                rows,
                dict(zip("kv", addresses[:2], strict=True)),
                elsewhere=elsewhere,
            )
            executor.fill(0xFF)
            done = np.zeros(len(self.contexts), int)
            for lengths in self.steps:
                there = [r for r, n in enumerate(lengths) if n]
                spans = [slice(done[r], done[r] + lengths[r]) for r in there]
                for place, source in zip(places, (self.x, self.gate_up), strict=True):
                    given = np.concatenate([source[r][span] for r, span in zip(there, spans, strict=True)])
                    place[: given.nbytes] = given.view(np.uint8).ravel()
                table_rows = np.arange(PAGES * len(self.contexts)).reshape(-1, PAGES)[there]
                done += lengths
                step, _held = ragged_step([lengths[r] for r in there], done[there], table_rows)
                executor.run(step)
                for name, tensor in program.results.items():
                    parts = np.split(executor.view(tensor, sum(lengths)).copy(), np.cumsum([lengths[r] for r in there]))
                    for r, part in zip(there, parts[:-1], strict=True):
                        made.setdefault(name, {}).setdefault(r, []).append(part)
        finally:
            team.close()
        results = {name: [np.concatenate(parts[r]) for r in sorted(parts)] for name, parts in made.items()}
        return results | dict(pages=[each.view(np.float32).copy() for each in pages])


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        for one, other in zip(found[name], arrays, strict=True):
            same_bits(one, other)


def differ(found, expected):
    return any(
        a.tobytes() != b.tobytes() for name in expected for a, b in zip(found[name], expected[name], strict=True)
    )


RAGGED = ((7, 64, 0), (1, 1, 1), (12, 65, 0), (0, 1, 0))
CASES = {
    "all of it rotated": Case(rope_dim=32, seed=1),
    "a part rotated, gated": Case(gated=True, seed=2),
    "none rotated, without norms": Case(rope_dim=0, normed=False, seed=3),
    "sign in the table": Case(H=3, G=1, K=48, rope_dim=48, pre_negated=True, seed=4),
    "added mask": Case(H=2, G=2, K=16, rope_dim=6, additive=True, seed=5),
    "added mask, gated, sign in the table": Case(additive=True, gated=True, pre_negated=True, normed=False, seed=6),
    "ragged steps": Case(steps=RAGGED, seed=7),
    "ragged steps, added mask": Case(steps=RAGGED, rope_dim=32, additive=True, seed=8),
    "a wide head": Case(H=2, G=1, K=128, rope_dim=128, seed=9, F=208),
    "no scale": Case(scale=1.0, additive=True, seed=10),
}


@pytest.mark.parametrize("name", CASES)
def test_twins_have_equal_bits(name):
    case = CASES[name]
    program = case.program()
    twin, expected = unroll(program), case.run(program, REFERENCE)
    assert not {op.kind for op in twin.ops} & {"rounded_inputs", "rounded_attention", "rounded_silu_mul"}
    assert np.isfinite(np.concatenate(expected["heads"])).all()
    same(case.run(program, CPU, 2), expected)
    same(case.run(twin, REFERENCE), expected)
    for num_threads in (1, 2, 3):
        same(case.run(twin, CPU, num_threads), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_twins_have_equal_bits_with_one_grid_at_every_site(grid):
    counts = dict(q=28, k=16, v=2, rope=2, swiglu=3, attention=20)
    grids = {name: np.tile(GRIDS[grid], (count, 1)) for name, count in counts.items()}
    case = Case(contexts=(5, 70), steps=((5, 70),), grids=grids, gated=True, additive=True, rope_dim=22)
    program = case.program()
    same(case.run(unroll(program), CPU, 2), case.run(program))


@pytest.mark.parametrize("seed", range(20, 32))
def test_random_twins_have_equal_bits(seed):
    rng = np.random.default_rng(seed)
    flags = dict(zip(("normed", "gated", "pre_negated", "additive"), rng.integers(0, 2, 4) > 0, strict=True))
    flags = {name: bool(flag) for name, flag in flags.items()}
    G, K = int(rng.integers(1, 4)), int(rng.choice([16, 32, 48, 64]))
    steps, left = [], np.array([40, 90, 2])
    while left.any():
        lengths = np.minimum(left, rng.choice([0, 1, 5, 33], 3))
        steps += [tuple(lengths)] if lengths.any() else []
        left = left - lengths
    rope = 2 * int(rng.integers(0, K // 2 + 1))
    shape = dict(H=G * int(rng.integers(1, 4)), G=G, K=K, rope_dim=rope, F=int(rng.integers(1, 70)))
    case = Case(contexts=(40, 90, 2), steps=tuple(steps), seed=seed, **shape, **flags)
    program = case.program()
    expected = case.run(program, CPU, 1)
    same(case.run(unroll(program), CPU, 1 + seed % 3), expected)
    if not case.additive:
        whole = Case(contexts=case.contexts, steps=(case.contexts,), seed=seed, **shape, **flags)
        same(whole.run(unroll(whole.program()), CPU, 2), expected)


def test_queries_that_others_read_are_put_side_by_side():
    case = Case(rope_dim=32, gated=True)
    for options in (dict(q=True), dict(apart=True), dict(apart=True, q=True)):
        program = case.program(**options)
        same(case.run(unroll(program), CPU, 2), case.run(program, CPU, 2))


def test_grids_that_change_are_those_of_both():
    case = Case(seed=11)
    program = case.program()
    twin = unroll(program)
    before = case.run(twin)
    for rows in case.grids.values():
        rows[:] = np.roll(rows, 1, axis=0)
    after = case.run(program)
    assert differ(after, before)
    same(case.run(twin), after)


def digest():
    """Digests of the results of both twins, for a case with every feature."""
    case, digests = CASES["ragged steps, added mask"], []
    for change in (unroll, lambda program: program):
        found = case.run(change(case.program()), CPU, 2)
        digests.append(hashlib.sha256(b"".join(array.tobytes() for name in found for array in found[name])).hexdigest())
    return digests


def test_other_targets_give_the_same_bits():
    command = [sys.executable, "-m", "tests.ptq.test_unroll"]
    printed = subprocess.run(command, env=compiling_for("haswell"), capture_output=True, text=True, check=True).stdout
    assert printed.split() == digest() and len({*digest()}) == 1


# ------------------------------------------------------------ a wrong twin is found

FINE = Case(
    rope_dim=16,
    gated=True,
    additive=True,
    contexts=(9, 70),
    steps=((9, 70),),
    grids={
        name: np.stack([integer(0.011 + 0.0001 * i, 3, -2000, 2000) for i in range(count)])
        for name, count in dict(q=28, k=16, v=2, rope=2, swiglu=3, attention=20).items()
    },
)


def wrong_ops(op):
    """Wrong forms of an op: with another head's scale, mask or keys."""
    if isinstance(op, FakeQuant):
        yield op.changed(grids=Setting("wrong", integer(0.0173, 3, -2000, 2000)[None]))
    if isinstance(op, MaskRows):
        yield op.changed(fill=-8.0)
    if isinstance(op, ScaleRows):
        yield op.changed(factor=0.2)
    if isinstance(op, (HeadScores, HeadValues, KeepHead)):
        yield op.changed(kv_head=1 - op.kv_head)


def test_every_wrong_grid_mask_and_head_shows():
    twin = unroll(FINE.program())
    right, found = FINE.run(twin), {}
    for i, op in enumerate(twin.ops):
        for wrong in wrong_ops(op):
            changed = twin.rewritten([*twin.ops[:i], wrong, *twin.ops[i + 1 :]])
            name = (op.outputs or op.inputs)[0].name
            found[f"{op.kind} {name}"] = differ(FINE.run(changed), right)
    assert len(found) > 80 and [name for name, differs in found.items() if not differs] == []


# ------------------------------------------------------------ the order


def names_of(program):
    """Names of the tensors that ops write, in order; consecutive writes to one tensor count once."""
    written = [tensor.name for op in program.ops for tensor in op.outputs]
    return [name for name, _ in itertools.groupby(written)]


def test_heads_come_one_after_the_other_in_the_order_of_hardware():
    case = Case(H=2, G=1, K=16, rope_dim=16, gated=True, additive=True)
    rotation = ["in", "norm", "cos", "x1", "x2", "cat", "sin", "rot"]
    expected = ["L0.q.rope.cos.0", "L0.q.rope.sin.0"]
    expected += [f"L0.q.k.{site}.0" for site in [*rotation, "all"]] + ["L0.q.v.all.0"]
    for head in range(2):
        expected += [f"L0.q.q.{site}.{head}" for site in rotation]
        expected += [f"L0.heads.{site}.{head}" for site in ("qk.raw", "qk", "qk.masked", "p", "pv", "gated")]
    expected += ["L0.heads", "L0.act.act.sig.0", "L0.act.act.0", "L0.act"]
    twin = unroll(case.program())
    assert names_of(twin) == expected
    rounded = [op.out.name for op in twin.ops if isinstance(op, FakeQuant)]
    assert rounded == [n for n in expected if n.split(".")[-2] not in ("in", "gated") and n != "L0.heads"]


def test_without_a_scale_there_is_no_step_for_it():
    case = Case(H=2, G=1, K=16, rope_dim=0, normed=False, scale=1.0)
    made = [name.removeprefix("L0.heads.") for name in names_of(unroll(case.program())) if name.startswith("L0.heads.")]
    assert made == [f"{site}.{head}" for head in range(2) for site in ("qk", "p", "pv")]


if __name__ == "__main__":
    print(*digest())
