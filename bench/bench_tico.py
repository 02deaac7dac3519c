"""A window under a quantization plan, against TICO 0.3.0 on the same model, plan and CPU: two processes, in turns.

    python bench/bench_tico.py --tico PYTHON [--layers 2] [--vocab 4096] [--act i16|u8] [--bits 4] [--rounds 7]

PYTHON: an interpreter with torch==2.13.0, transformers and tico==0.3.0. A random Llama model (1024 wide, 3072 in the
FFN, 16 query and 8 kv heads of 128) and TICO's own plan: every activation on one grid a tensor, linear weights on
asymmetric rows of some bits, embedding and head on 8. TICO's `npu_export` (head by head) stands beside our `prefill`,
its `reference_eval` (batched) with our `prefill_reference`, in float arithmetic, and with the plan's linear layers in
integers. TICO rounds its weights again in every forward pass; ours are rounded once. Both make logits; ours score them.
Also: one calibration window of each.
"""

import json
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path

from options import Parser, program, whole_number

from lockstep.engine.model import load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.new_files import scratch_folder
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import sites_of
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import treatment_of
from lockstep.ptq.unroll import unroll
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.text import NO_TARGET
from lockstep.weights.store import WeightStore

SHAPE = {"hidden": 1024, "ffn": 3072, "heads": 16, "kv-heads": 8, "head-dim": 128}
WORKER = Path(__file__).with_name("peers") / "tico_worker.py"


class Tico:
    """TICO's process."""

    def __init__(self, python, folder, args):
        sizes = SHAPE | {name: getattr(args, name) for name in ("layers", "vocab", "tokens", "threads", "bits", "act")}
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        command = [python, str(WORKER), "--folder", str(folder), *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = json.loads(self._line())

    def _line(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench_tico.py: the process that runs TICO has ended; its error is above")
        return line

    def seconds(self, run):
        self._process.stdin.write(f"{run}\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def plan_of(args, arithmetic):
    """TICO's plan as a Plan."""
    rules = [["*", args.act], ["*.w", f"u{args.bits}/row"], ["embed.w", "u8/row"], ["head.w", "u8/row"]]
    rules += [["*norm*.w", "i16/tensor"], ["L*.res.attn", "off"]]
    rope = dict(mask="additive", rope="pre_negated")
    return Plan(rules, arithmetic=arithmetic, **rope)


def rigs_of(model, team, args, windows):
    """{name: a rig with a window under the plan}, and the seconds of a calibration window."""
    sites = sites_of(model.recorded, additive=True)
    plan = plan_of(args, "float")
    treatment, specs = treatment_of(plan, sites, args.tokens), plan.resolve(sites)
    started = time.perf_counter()
    stats = calibrate(model, treatment, team, windows)
    calibration = (time.perf_counter() - started) / len(windows)
    grids = Solved.solve(plan, "random", "", sites, stats).grids
    in_heads = lambda rounded: unroll(rounded.program)
    ways = {"prefill": (in_heads, "float"), "prefill_reference": (None, "float"), "integer": (None, "integer")}
    made = {}
    for name, (change, arithmetic) in ways.items():
        made[name] = rig = Rig(model, treatment, team, args.tokens, change, compares=args.kl)
        rig.set_grids(grids)
        rig.set_weights(specs, arithmetic)
        rig.load(windows[0], [*windows[0][1:], NO_TARGET])
    return made, calibration


def main():
    parser = Parser(__doc__)
    parser.add_argument("--tico", type=program, required=True, metavar="PYTHON")
    parser.add_counts(layers=2, vocab=4096, rounds=7)
    parser.add_argument("--tokens", type=whole_number(2), default=512, help="of a window; all but the first are scored")
    parser.add_threads()
    parser.add_argument("--bits", type=whole_number(2, 8), default=4, help="of weights of linear layers")
    parser.add_argument("--kl", action="store_true", help="ours also compare with the float model, which TICO does not")
    parser.add_argument("--act", choices=("i16", "u8"), default="i16")
    args = parser.parse_args()
    with scratch_folder() as folder, closing(Tico(args.tico, folder, args)) as tico:
        model = load_model(open_checkpoint(folder), WeightStore(), "f32", "f32", args.tokens)
        with closing(Team(args.threads)) as team:
            rigs, calibration = rigs_of(model, team, args, tico.about["windows"])
            seconds = measured(rigs, tico, args.rounds)
    report(args, seconds, calibration, tico.about["calibration"])


def measured(rigs, tico, rounds):
    """{run: median seconds} of interleaved rounds; the first warms up."""
    seconds = {name: [] for name in (*rigs, "npu_export", "reference_eval")}
    for _ in range(rounds + 1):
        for name in seconds:
            if name in rigs:
                started = time.perf_counter()
                rigs[name].run()
                seconds[name].append(time.perf_counter() - started)
            else:
                seconds[name].append(tico.seconds(name))
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def report(args, seconds, calibration, theirs):
    print(
        f"{args.layers} layers, vocabulary {args.vocab}, {args.tokens} tokens, {args.threads} threads, "
        f"w{args.bits}a{args.act[1:]}, medians of {args.rounds} rounds"
    )
    for name, rival in (
        ("prefill", "npu_export"),
        ("prefill_reference", "reference_eval"),
        ("integer", "reference_eval"),
    ):
        ratio = seconds[rival] / seconds[name]
        print(f"{name:18}{1e3 * seconds[name]:8.1f} ms   TICO {rival:15}{1e3 * seconds[rival]:8.1f} ms   {ratio:.2f}x")
    print(f"calibration of a window {1e3 * calibration:.1f} ms (with making the program), TICO {1e3 * theirs:.1f} ms")


if __name__ == "__main__":
    main()
