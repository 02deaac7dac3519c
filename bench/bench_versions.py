"""This version of Lockstep against another: two processes take turns at the same work; ratios of the rounds' times.

    git worktree add ../before COMMIT
    python bench/bench_versions.py ../before [--models qwen3-0.6b,qwen3.5-0.8b] [--weights q8_0,bf16,q4_k_m] [--ragged]

Models are made of random weights in published shapes, in memory. Each process keeps its model and runs a round when it
is told to: a prompt of 512 tokens; 16 steps of one request and of eight after 100 tokens of context; with --ragged the
mixes of bench_ragged.py. Printed are the median of the ratios (seconds of this version by seconds of the other), the
95 % interval of that median, and whether both versions gave the same bits.
"""

import hashlib
import importlib
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT, CONTEXT, STEPS, REQUESTS = 512, 100, 16, 8
SHAPES = {"qwen3-0.6b": "QWEN3_0_6B", "qwen3.5-0.8b": "QWEN3_5_0_8B"}


# ---------------------------------------------------------------- in a worker: one version, with its own modules


def found(name, *modules):
    """A name from the first of these modules that exists and has it: older versions have other folders."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name}: in none of {', '.join(modules)}")


def format_of(name, shape, weights):
    """The stored format of a tensor; q4_k_m as llama.cpp mixes it: some of the sensitive matrices are q6_k."""
    if len(shape) != 2 or "conv1d" in name:
        return "f32"
    if weights != "q4_k_m":
        return weights
    return "q6_k" if "embed_tokens" in name or "v_proj" in name or "down_proj" in name else "q4_k"


BLOCKS = {  # of any version: weights, bytes, and where the float16 scales lie
    "q8_0": (32, 34, (0,)),
    "q4_0": (32, 18, (0,)),
    "q4_k": (256, 144, (0, 2)),
    "q6_k": (256, 210, (208,)),
}
WEIGHTS = (*BLOCKS, "q4_k_m", "f32", "f16", "bf16")


def random_tensor(name, shape, format):
    import numpy as np

    from lockstep.weights.tensor import StoredTensor, stored_shape

    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
    if format not in BLOCKS:
        values = (rng.standard_normal(shape, np.float32) * np.float32(0.02 if len(shape) == 2 else 0.5)).astype(
            np.float32
        )
        return StoredTensor(name, format, shape, values.astype(stored_shape(format, shape)[1]))
    size, num_bytes, scales = BLOCKS[format]
    made = np.frombuffer(rng.bytes(shape[0] * shape[1] // size * num_bytes), np.uint8)
    made = made.reshape(shape[0], -1, num_bytes).copy()
    for at in scales:
        made[..., at : at + 2] = np.array([2.0**-12 if size == 32 else 2.0**-17], np.float16).view(np.uint8)
    return StoredTensor(name, format, shape, made.reshape(shape[0], -1))


def random_model(shape, weights):
    from lockstep.engine.model import Model, emit_sampling
    from lockstep.models.record import Recorder
    from tests.models import published

    store = found("WeightStore", "lockstep.weights.store", "lockstep.runtime.executor")
    record = found("record", "lockstep.models.recording", "lockstep.models.decoder")
    model_config = found("model_config", "lockstep.models.registry", "lockstep.models.families")
    raw = getattr(published, SHAPES[shape])
    raw = raw.get("text_config", raw) | {"tie_word_embeddings": True}
    made = {}

    def stored(self, name, *shape):
        if name not in made:
            made[name] = random_tensor(name, shape, format_of(name, shape, weights))
        return made[name]

    Recorder.stored, Recorder.check_all_used = stored, lambda self: None
    config = model_config(raw)
    program, logits = record(config, {"model.embed_tokens.weight": None}, "auto", "bf16", 4096)
    emit_sampling(program, logits, config.vocab_size)
    return Model(None, config, program, logits, store(), "auto", "bf16", 4096)


def model_tasks(shape, weights):
    """{name: function that does the work of a round and returns what it computed}."""
    import numpy as np

    from lockstep.engine.runner import Limits, Runner, Span
    from lockstep.runtime.threads import Team

    greedy = found("GREEDY", "lockstep.lab.parity", "lockstep.parity")

    model = random_model(shape, weights)
    pages = -(-PROMPT // 64)
    try:
        everywhere = found("everywhere", "lockstep.engine.cache.pages", "lockstep.engine.pages")
    except ImportError:  # a version with one list of pages for all layers
        everywhere = list
    runner = Runner(model, Team(len(os.sched_getaffinity(0))), Limits(PROMPT, REQUESTS, pages * REQUESTS, REQUESTS))
    ids = np.random.default_rng(7).integers(0, model.config.vocab_size, PROMPT).tolist()

    def span(slot, start, end):
        held = everywhere(range(slot * pages, (slot + 1) * pages))
        return Span(ids[start:end], start, held, slot, {end - start - 1: greedy})

    def prefill():
        return runner.step([span(0, 0, PROMPT)])[2].copy()

    def decode(requests):
        for slot in range(requests):
            runner.step([span(slot, 0, CONTEXT)])

        def steps():
            for i in range(CONTEXT, CONTEXT + STEPS):
                logits = runner.step([span(slot, i, i + 1) for slot in range(requests)])[2]
            return logits.copy()

        return steps

    return {"prefill 512": prefill, "decode of 1": decode(1), f"decode of {REQUESTS}": decode(REQUESTS)}


def ragged_tasks():
    from bench.bench_ragged import DTYPES, KV, MIXES, batch, ragged

    def task(mix, dtype):
        b = batch(MIXES[mix], KV, DTYPES[dtype], 16)

        def run():
            for _ in range(40 if mix == "decode" else 4):
                ragged(b, len(os.sched_getaffinity(0)))
            return b.out

        return run

    return {f"ragged {mix} {dtype}": task(mix, dtype) for dtype in DTYPES for mix in MIXES}


def work(what):
    """A worker: runs a round for every name on its input; writes its seconds and a digest of its results."""
    tasks = ragged_tasks() if what == ["ragged"] else model_tasks(*what)
    print(*tasks, sep="\t", flush=True)
    for line in sys.stdin:
        run = tasks[line.strip()]
        started = time.perf_counter()
        result = run()
        spent = time.perf_counter() - started
        print(spent, hashlib.sha256(result.tobytes()).hexdigest()[:16], flush=True)


# ---------------------------------------------------------------- the driver


class Version:
    """A process that runs one version."""

    def __init__(self, folder, what):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, str(ROOT / "bench" / "bench_versions.py"), "--worker", *what]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, env=environment, cwd=folder, **pipes)

    def tasks(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a version could not start")
        return line.rstrip("\n").split("\t")

    def run(self, task):
        self._process.stdin.write(task + "\n")
        self._process.stdin.flush()
        seconds, digest = self._process.stdout.readline().split()
        return float(seconds), digest

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def interval(ratios):
    """The 95 % interval of the median, from order statistics."""
    ordered, n = sorted(ratios), len(ratios)
    skip = max(0, round(n / 2 - 0.98 * n**0.5) - 1)
    return ordered[skip], ordered[n - 1 - skip]


def compare(before, what, rounds):
    """Prints a line for each task of two versions."""
    here, there = Version(ROOT, what), Version(before, what)
    tasks = here.tasks()
    assert tasks == there.tasks(), "the versions have other tasks"
    for task in tasks:
        digests, ratios = {version.run(task)[1] for version in (here, there)}, []
        for i in range(rounds):
            pair = (here, there) if i % 2 == 0 else (there, here)
            seconds = {version: version.run(task)[0] for version in pair}
            ratios.append(seconds[here] / seconds[there])
        low, high = interval(ratios)
        bits = "same bits" if len(digests) == 1 else "OTHER BITS"
        median = statistics.median(ratios)
        print(f"{' '.join(what):24} {task:18} {median:.3f} ({low:.3f} to {high:.3f})  {bits}", flush=True)
    here.close(), there.close()


def arguments():
    """The options' values."""
    from options import Parser, folder, one_of, several  # in this folder; a worker may be of a version without it

    parser = Parser(__doc__)
    parser.add_argument("before", type=folder, help="folder of the other version")
    parser.add_argument("--models", type=several(one_of(SHAPES), or_none=True), default=",".join(SHAPES))
    parser.add_argument("--weights", type=several(one_of(WEIGHTS)), default="q8_0,bf16,q4_k_m")
    parser.add_counts(rounds=20)
    parser.add_argument("--ragged", action="store_true", help="the mixes of bench_ragged.py, too")
    args = parser.parse_args()
    if not (args.before / "lockstep").is_dir():
        parser.error(f"{args.before}: expected a version of Lockstep, there is no folder lockstep in it")
    if not (args.models or args.ragged):
        parser.error("--models '': expected a model, or --ragged")
    return args


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2:])
    args = arguments()
    print(f"seconds of {ROOT.name} by seconds of {args.before.resolve().name}, {args.rounds} rounds")
    for shape in args.models:
        for weights in args.weights:
            compare(args.before.resolve(), [shape, weights], args.rounds)
    if args.ragged:
        compare(args.before.resolve(), ["ragged"], args.rounds)


if __name__ == "__main__":
    main()
