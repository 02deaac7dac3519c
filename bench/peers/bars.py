#!/usr/bin/env python3
"""Lockstep against llama.cpp on the layers of models that people have, and formats against formats, with their bars.

  bars.py [layers] [formats] [experts] [--files PART ...] [--rounds 7] [--json OUT]

layers   prefill of 512, decode of one request, decode of 8: two processes with the same file take turns; each ratio
         is the median of those of the rounds, with its 95 % interval. A file is timed only once both engines agree on
         its logits (verify_layers.py), which is noted beside it.
formats  linear layers of one row and of 512 in one process: groups and MXFP4 against Q4_0, Q3_K and Q2_K against Q4_K
experts  the time of a layer's experts for 1 to 32 tokens, as GB/s of the weights that these tokens need, read once

Runs with Lockstep's interpreter; $PEERS_DIR has the llama.cpp peer and the files of make_layers.py.
"""

import json
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
import verify_layers
from bench_versions import interval
from format_bars import experts, formats
from options import Parser, json_file, threads, whole_number
from turns import REQUESTS, Engine

PROMPT, PARTS = 128, ("layers", "formats", "experts")
# {metric: (bar, requests, tokens of a prompt, new tokens)}
METRICS = {
    "prefill 512": (3.0, 1, 512, 1),
    "decode of 1": (1.25, 1, PROMPT, 65),
    f"decode of {REQUESTS}": (2.5, REQUESTS, PROMPT, 33),
}
ALIKE = f"decode of {REQUESTS} alike"  # the same prompt: all choose the same experts


def speed(engine, metric, path, seed, is_alike=False):
    """(tokens per second, cores used by others)"""
    _, num, num_tokens, num_new = METRICS[metric]
    seeds = [seed if is_alike else 100 * seed + i for i in range(num)]
    done = engine.run([verify_layers.prompt(path, num_tokens, each) for each in seeds], num_new)
    return (num_tokens * num / done.first if num_new == 1 else done.num / done.others), done.foreign


def measure(path, rounds, threads):
    """{metric: figures} of a file, engines in turns; the first round is a warm-up."""
    engines = [Engine(name, path, threads) for name in ("lockstep", "llama.cpp")]
    seen, alike, foreign = {metric: [] for metric in METRICS}, [], 0.0
    for i in range(rounds + 1):
        order = engines if i % 2 else engines[::-1]
        for metric in METRICS:
            found = {engine.name: speed(engine, metric, path, i) for engine in order}
            if i:
                seen[metric].append((found["lockstep"][0], found["llama.cpp"][0]))
                foreign = max(foreign, *(cores for _, cores in found.values()))
        if i:
            alike.append(speed(engines[0], f"decode of {REQUESTS}", path, i, is_alike=True)[0])
    for engine in engines:
        engine.close()
    made = {metric: figures(pairs, METRICS[metric][0]) for metric, pairs in seen.items()}
    return made | {ALIKE: dict(lockstep=round(statistics.median(alike), 1)), "other_cpu": foreign}


def figures(pairs, bar):
    """Medians of paired speeds, ours and others', and of their ratios."""
    ratios = [ours / others for ours, others in pairs]
    ratio = statistics.median(ratios)
    return {
        "lockstep": round(statistics.median(ours for ours, _ in pairs), 1),
        "llama.cpp": round(statistics.median(others for _, others in pairs), 1),
        "ratio": round(ratio, 3),
        "interval": [round(end, 3) for end in interval(ratios)],
        "bar": bar,
        "is_met": ratio >= bar,
    }


def layers(a):
    """{file: figures}, and a line for each metric while they come."""
    print(
        "| file | metric | Lockstep tok/s | llama.cpp tok/s | ratio (95 %) | bar | |\n|---|---|---:|---:|---:|---:|---|"
    )
    found = {}
    for path in verify_layers.paths(a.files):
        name = os.path.basename(path)
        if not verify_layers.agreed(path, a.threads):
            raise SystemExit(f"{name}: the engines do not agree on its logits, see verify_layers.py")
        found[name] = measure(path, a.rounds, a.threads)
        for metric in METRICS:
            print(line(name, metric, found[name][metric]), flush=True)
        print(f"| {name} | {ALIKE} | {found[name][ALIKE]['lockstep']} | | | | |", flush=True)
    return found


def line(name, metric, f):
    low, high = f["interval"]
    met = "met" if f["is_met"] else "**missed**"
    ratio = f"{f['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return f"| {name} | {metric} | {f['lockstep']} | {f['llama.cpp']} | {ratio} | {f['bar']} | {met} |"


def main():
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART")
    parser.add_argument("--files", nargs="*", default=[], help="parts of file names")
    parser.add_argument("--rounds", type=whole_number(), default=7)
    parser.add_argument("--threads", type=threads, default=2)
    parser.add_argument("--json", type=json_file)
    a = parser.parse_args()
    if "layers" in (a.parts or PARTS):
        verify_layers.made(parser, a.files)
    pc.enter("lockstep", a.threads)
    made = {}
    for name, part in dict(layers=layers, formats=formats, experts=experts).items():
        if name in (a.parts or PARTS):
            made[name] = part(a)
    if a.json:
        known = json.loads(a.json.read_text()) if a.json.exists() else {}
        a.json.write_text(json.dumps(known | made, indent=1) + "\n")


if __name__ == "__main__":
    main()
