#!/usr/bin/env python3
"""Markdown table from the JSON lines of bench_peers.py: table.py FILE ...  (later lines replace earlier ones;
lines taken while other processes used more than 15 % of a core are left out)"""

import json
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from options import Parser, file

parser = Parser(__doc__)
parser.add_argument("files", nargs="+", type=file)

cols = ["prefill_512", "prefill_1000", "prefill_2048", "decode_b1", "decode_b4", "decode_b8"]
T = {}
for f in parser.parse_args().files:
    for line in open(f):
        d = json.loads(line)
        if d.get("other_cpu", 0) <= 0.15:
            T.setdefault((d["model"], d["peer"], d["format"]), {})[d["metric"]] = d["value"]
print("| model | peer | format | " + " | ".join(c.replace("_", " ") for c in cols) + " |")
print("|---|---|---|" + "---:|" * len(cols))
order = ["qwen3-0.6b", "qwen3.5-0.8b", "llama-3.2-1b"]
for k in sorted(T, key=lambda k: (order.index(k[0]) if k[0] in order else 9, k[1], k[2])):
    print(
        f"| {k[0]} | {k[1]} | {k[2]} | "
        + " | ".join("" if c not in T[k] else f"{T[k][c]:.0f}" if T[k][c] >= 100 else f"{T[k][c]:.1f}" for c in cols)
        + " |"
    )
