"""The linear-attention layer's ops at the Qwen3.5-0.8B shape: time per token and layer, by op, and the ceiling.

    python bench/bench_gated_delta.py [--threads 1] [--rounds 9] [--drafts]

Fused and unfused inputs and the per-token recurrence run interleaved in one process; the best of the rounds counts,
since the machine may be shared. The floor of the recurrence is 4 multiplications or FMAs for each element of the state,
at this core's measured FMA rate.
"""

import time

import numpy as np
from options import Parser

from lockstep.native.kernel import kernel
from lockstep.native.simd import fma, lanes, load, store
from lockstep.ops.recurrent import conv1d_cpu, gated_delta_cpu, gated_delta_verify_cpu, gated_norm_cpu
from lockstep.ops.recurrent.conv1d import Conv1d
from lockstep.ops.recurrent.gated_delta import DeltaGates, DeltaInputs, GatedDelta, L2Norm
from lockstep.ops.recurrent.gated_delta_verify import GatedDeltaVerify
from lockstep.ops.recurrent.gated_norm import GatedNorm
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import ragged_step, weight

G, H, K, V, J = 16, 16, 128, 128, 4
MOST = 7  # drafts
C = 2 * G * K + H * V
W = C + H * V + 2 * H
ROUNDS = 1 << 16
HALF = np.float32(0.5)


class Projection(Operands):
    """An op in the place of the linear layer that produces the inputs: its rows are written once."""

    out: Tensor = output()


class FmaRate(Operands):
    """Chains of FMAs."""

    out: Tensor = output()


@kernel
def nothing(op, step, thread, num_threads):
    """The kernel of Projection: it computes nothing."""


@kernel
def fma_rate(op, step, thread, num_threads):
    """Six independent chains of FMAs on sixteen lanes."""
    x, out = lanes(HALF), FmaRate.read(op).out
    a, b, c, d, e, f = load(out), load(out + 4), load(out + 8), load(out + 12), load(out + 16), load(out + 20)
    for _ in range(ROUNDS):
        a, b, c, d, e, f = fma(a, x, a), fma(b, x, b), fma(c, x, c), fma(d, x, d), fma(e, x, e), fma(f, x, f)
    store(out, a + b + c + d + e + f)


BACKEND = {
    **conv1d_cpu.CPU,
    **gated_delta_cpu.CPU,
    **gated_delta_verify_cpu.CPU,
    **gated_norm_cpu.CPU,
    "projection": Implementation(nothing),
    "fma_rate": Implementation(fma_rate),
}


def layer(program, proj, i, fused, weights):
    """Records one layer."""
    conv = program.cache(f"conv{i}", "state", "f32", (J - 1, C))
    state = program.cache(f"state{i}", "state", "f32", (H, V // 16, K, 16))
    heads, dims = dict(num_k_heads=G, num_v_heads=H), dict(k_head_dim=K, v_head_dim=V)
    norm, gates = weights["norm"], {n: weights[n] for n in ("a_log", "dt_bias")}
    gates.update(x=proj, row_width=W, a_offset=C + H * V, b_offset=C + H * V + H, num_v_heads=H)
    taps = dict(weight=weights["conv"], state=conv, offset=0, channels=C, conv_width=J)
    u, decays = program.tensor("u", "T", C), program.tensor("gates", "T", 2 * H)
    if fused:
        qk = program.emit(DeltaInputs(out=u, gates=decays, num_k_heads=G, k_head_dim=K, **gates, **taps))
    else:
        program.emit(Conv1d(out=u, x=proj, row_width=W, **taps))
        qk = program.tensor("qk", "T", 2 * G * K)
        program.emit(L2Norm(out=qk, x=u, row_width=C, num_k_heads=G, k_head_dim=K))
        program.emit(DeltaGates(out=decays, **gates))
    o, y = program.tensor("o", "T", H * V), program.tensor("y", "T", H * V)
    where = dict(qk_width=qk.width, v_width=C, v_offset=2 * G * K)
    program.emit(GatedDelta(out=o, qk=qk, v=u, gates=decays, state=state, **where, **heads, **dims))
    where = dict(row_width=W, z_offset=C, num_heads=H, head_dim=V)
    program.emit(GatedNorm(out=y, o=o, z=proj, weight=norm, eps=1e-6, **where))


def build(num_layers, num_slots, num_tokens, team, backend, fused):
    """An executor with random weights and a random projection, and the arrays that keep its caches alive."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (C, J), "a_log": H, "dt_bias": H, "norm": V}
    weights = {name: weight(rng.standard_normal(shape) * 0.3, name) for name, shape in shapes.items()}
    program = Program()
    proj = program.tensor("proj", "T", W)
    program.emit(Projection(out=proj))
    for i in range(num_layers):
        layer(program, proj, i, fused, weights)
    memory = {c.name: np.zeros((num_slots, *c.shape), np.float32) for c in program.caches}
    executor = Executor(
        program,
        backend,
        team,
        WeightStore(),
        dict(T=num_tokens, S=num_slots, R=num_slots),
        {n: a.ctypes.data for n, a in memory.items()},
    )
    executor.view(proj, num_tokens)[...] = rng.standard_normal((num_tokens, W))
    return executor, memory


def times(executor, step):
    """Nanoseconds by op kind of one step."""
    clock, total = np.zeros(len(executor.program.ops), np.int64), {}
    executor.run(step, clock)
    for op, spent in zip(executor.program.ops[1:], np.diff(clock), strict=True):
        total[op.kind] = total.get(op.kind, 0) + int(spent)
    return total


def fma_floor():
    """Microseconds that 4 H K V multiplications or FMAs take on one core."""
    program = Program()
    program.emit(FmaRate(out=program.tensor("x", "T", 32)))
    executor = Executor(program, BACKEND, Team(1), WeightStore(), dict(T=1, S=1, R=1), {})
    step, _keep = ragged_step([1])
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        executor.run(step)
        spent.append(time.perf_counter() - start)
    return min(spent) / (ROUNDS * 6 * 16) * 4 * H * K * V * 1e6


def measure(lengths, contexts, num_layers, team, rounds):
    """Prints a line for each variant: microseconds per token and layer of each op."""
    step, _keep = ragged_step(lengths, contexts)
    per_token = {**BACKEND, **gated_delta_cpu.PER_TOKEN}
    ways = {"unfused": (BACKEND, False), "fused": (BACKEND, True), "per token": (per_token, True)}
    built = {name: build(num_layers, len(lengths), sum(lengths), team, *way) for name, way in ways.items()}
    seen = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (executor, _) in built.items():
            seen[name].append(times(executor, step))
    print(f"{len(lengths)} requests, {sum(lengths)} tokens")
    for name, rows in seen.items():
        each = {kind: min(r[kind] for r in rows[1:]) / 1e3 / num_layers / sum(lengths) for kind in rows[0]}
        parts = "".join(f" {kind} {us:.2f}" for kind, us in each.items())
        print(f"  {name:10s}{parts} | {sum(each.values()):.2f} us per token and layer")


class Rule:
    """The recurrence alone, in so many layers that their states come from memory, for one request.

    drafts: whether it is the op that can forget drafts.
    """

    def __init__(self, drafts: bool, num_tokens, team, num_layers=40):
        self.drafts, self.num_layers, program = drafts, num_layers, Program()
        given = {name: program.tensor(name, "T", width) for name, width in dict(u=C, gates=2 * H).items()}
        for tensor in given.values():
            program.emit(Projection(out=tensor))
        where = dict(qk=given["u"], v=given["u"], gates=given["gates"], qk_width=C, v_width=C, v_offset=2 * G * K)
        where |= dict(num_k_heads=G, num_v_heads=H, k_head_dim=K, v_head_dim=V)
        for i in range(num_layers):
            state = program.cache(f"state{i}", "state", "f32", (H, V // 16, K, 16))
            out = program.tensor(f"o{i}", "T", H * V)
            if drafts:
                records = program.cache(f"records{i}", "records", "f32", (2 * MOST + 1, H * V + G * K + H))
                more = dict(records=records, num_records=2 * MOST + 1)
                program.emit(GatedDeltaVerify(out=out, state=state, **where, **more))
            else:
                program.emit(GatedDelta(out=out, state=state, **where))
        self.memory = {c.name: aligned(c.bytes_each) for c in program.caches}
        places, sizes = {n: a.ctypes.data for n, a in self.memory.items()}, dict(T=num_tokens, S=1, R=1)
        self.executor = Executor(program, BACKEND, team, WeightStore(), sizes, places, keep_all=True)
        rng = np.random.default_rng(0)
        for tensor in given.values():
            self.executor.view(tensor, num_tokens)[...] = rng.random((num_tokens, tensor.width), np.float32) * 0.1

    def seconds(self, num_tokens, pending=0):
        """Seconds of one layer: the median, since other processes may disturb some runs."""
        counts = dict(num_drafts=[num_tokens - 1], num_pending=[pending]) if self.drafts else {}
        step, _keep = ragged_step([num_tokens], [100], **counts)
        clock = np.zeros(len(self.executor.program.ops), np.int64)
        self.executor.run(step, clock)
        return float(np.median(np.diff(clock[-1 - self.num_layers :]))) / 1e9


def measure_drafts(team, rounds, pendings=(0, 4, 7)):
    """Prints the time of steps with drafts, some of them pending, against the plain op, by number of rows."""
    plain, verify = Rule(False, MOST + 1, team), Rule(True, MOST + 1, team)
    print("recurrence of one request, us a layer: plain, and with one certain row and drafts, by how many are pending")
    for rows in range(1, MOST + 2):
        found = [(plain.seconds(rows), *(verify.seconds(rows, p) for p in pendings)) for _ in range(4 * rounds)]
        one, *others = np.percentile(found, 25, axis=0)
        ratios = np.median([[v / p for v in verified] for p, *verified in found], axis=0)
        parts = "".join(
            f"  pending {p}: {us * 1e6:6.1f} {r:.2f}x" for p, us, r in zip(pendings, others, ratios, strict=True)
        )
        print(f"  rows {rows}  {one * 1e6:6.1f}{parts}")


def main():
    parser = Parser(__doc__)
    parser.add_threads(usual=1)
    parser.add_counts(rounds=9)
    parser.add_argument("--drafts", action="store_true", help="only the recurrence over drafts")
    args = parser.parse_args()
    team = Team(args.threads)
    print(f"recurrence, floor on one core: {fma_floor():.1f} us per token and layer; {args.threads} threads")
    measure_drafts(team, args.rounds)
    for num_tokens in () if args.drafts else (512, 64):
        measure([num_tokens], [num_tokens], 2, team, args.rounds)
    for num_requests in () if args.drafts else (1, 8):
        measure([1] * num_requests, [100] * num_requests, 18, team, args.rounds)
    team.close()


if __name__ == "__main__":
    main()
