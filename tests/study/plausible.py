"""A study's folder with made-up numbers that look like real ones: python -m tests.study.plausible FOLDER."""

import functools
import hashlib
import json
import pathlib
import sys

import numpy as np

from lockstep.ptq.plan import Plan
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec
from lockstep.study.scoring.figures import INTERVAL, mean_and_error

LAYERS, HEADS, KV_HEADS, WIDTH = 6, 8, 2, 256
WINDOWS, NLL = 24, 2.4713
BASE = [["*", "i16"], ["*.w", "i8"]]
INNER = {"q.rot": HEADS, "k.rot": KV_HEADS, "k.all": KV_HEADS, "v.all": KV_HEADS, "qk": HEADS, "p": HEADS}
OUTER = {"norm1": 1, "q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "ctx": HEADS, "o": 1, "res.attn": 1, "norm2": 1}
MLP = {"gate": 1, "up": 1, "mul": 1, "down": 1, "res.mlp": 1}
WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
LOUD = {"down": 2.5, "mul": 3.0, "qk": 1.8, "p": 2.2, "res.mlp": 1.6, "norm2": 0.7, "w": 0.05}  # what hurts most


def write(folder, seed=7, num_trials=60, confirmed=5):
    """Writes a study; returns its folder."""
    rng, sites = np.random.RandomState(seed), all_sites()
    folder.mkdir(parents=True, exist_ok=True)
    plans = [("base", {}, Plan(BASE)), *alone(sites), *products()][:num_trials]
    noise = rng.normal(0, 1, (num_trials, 2 * WINDOWS))
    trials = [trial(i, name, swept, plan, sites, noise) for i, (name, swept, plan) in enumerate(plans)]
    save(folder / "study.json", json.dumps(study(sites, rng), indent=1))
    save(folder / "recipe.toml", RECIPE)
    save(folder / "trials.jsonl", lines(trials))
    done = sorted((t for t in trials if t["status"] == "done"), key=lambda t: t["metrics"]["delta_nll"])[:confirmed]
    save(folder / "confirm.jsonl", lines(confirmations(done)))
    if done:
        save(folder / "winner.json", json.dumps(dict(plan=done[0]["plan"], model="study-llama")))
    return folder


def save(path, text):
    path.write_text(text, "utf-8")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def site(name, heads=1, width=0, layer=None, is_weight=False, is_inner=False):
    return dict(name=name, heads=heads, width=width, layer=layer, is_weight=is_weight, is_inner=is_inner)


def all_sites():
    made = [site("embed.w", width=WIDTH, is_weight=True), site("embed", width=WIDTH)]
    for i in range(LAYERS):
        made += [site(f"L{i}.{n}", heads, WIDTH // heads, i) for n, heads in (OUTER | MLP).items()]
        made += [site(f"L{i}.{n}", heads, 32, i, is_inner=True) for n, heads in INNER.items()]
        made += [site(f"L{i}.{n}.w", width=WIDTH, layer=i, is_weight=True) for n in WEIGHTS]
    return [*made, site("norm", width=WIDTH), site("head", width=4096)]


def alone(sites):
    """Plans that differ from the base plan at one activation."""
    for s in sites:
        if s["name"].split(".", 1)[-1] in ("qk", "p", "k.all", "mul", "down", "res.mlp", "norm2"):
            yield f"{s['name']} u8", {"site": s["name"], "spec": "u8"}, Plan([*BASE, [s["name"], "u8"]])


def products():
    """Plans with different grids for weights, for the KV cache and for softmax weights."""
    for weights in ("u4/row:mse", "i6/row"):
        for cache in ("i16", "i8", "i8/head"):
            for p in ("u12", "u8", "u8/head"):
                rules = [*BASE, ["*.w", weights], ["L*.[kv].all", cache], ["L*.p", p]]
                yield f"w {weights}, cache {cache}, p {p}", {"w": weights, "cache": cache, "p": p}, Plan(rules)


def hurt(specs):
    """A rough cost of a plan's grids, in nats."""
    total = 0.0
    for name, spec in specs.items():
        loud = next((x for end, x in LOUD.items() if name.endswith("." + end)), 0.6)
        depth = 1.6 - 0.2 * (int(name[1:].split(".")[0]) % LAYERS) if name[0] == "L" else 1.0
        total += depth * loud * 2.0 ** (-1.6 * bits_of(spec)) * (0.6 if "/head" in spec else 1.0)
    return 6 * total


def trial(number, name, swept, plan, sites, noise):
    """A line of trials.jsonl. noise: random numbers for each trial and window."""
    status = "failed" if number == 11 else "stopped" if number in (20, 41) else "done"
    made = dict(id=f"{number:04x}", name=name, swept=swept, plan=plan.to_table(), plan_hash=plan.hash, status=status)
    if status == "failed":
        return made | dict(windows=0, reason="site L3.qk: calibration saw no number (head 2)")
    specs = {s: str(spec) for s, spec in plan.resolve([Site(**s) for s in sites]).items() if not spec.is_off}
    windows, cost = WINDOWS if status == "done" else 8, hurt(specs)
    deltas = cost * (1 + 0.1 * noise[number, :windows]) + 2e-4 * noise[number, -windows:]
    heads, skipped = {s["name"]: s["heads"] for s in sites}, int(name[1]) if "site" in swept else 0
    return made | dict(
        windows=windows,
        metrics=metrics(deltas, specs),
        window_nll=(base_nll()[:windows] + deltas).tolist(),
        forwards=windows,
        layers_run=windows * (LAYERS - skipped),
        layers_saved=windows * skipped,
        sites={site: figures(site, spec, heads[site]) for site, spec in specs.items()},
    )


def base_nll():
    """Made-up losses of the float model, by window."""
    return NLL + np.random.RandomState(1).normal(0, 0.2, WINDOWS)


def bits_of(spec):
    """The number of bits of a code."""
    return Spec.parse(spec).bits


def metrics(deltas, specs):
    delta, error = mean_and_error(deltas.tolist())
    bits = np.mean([bits_of(spec) for name, spec in specs.items() if name.endswith(".w")])
    kl, nll = abs(delta) * 0.9 + 1e-5, float(base_nll()[: len(deltas)].mean()) + delta
    return dict(
        tokens=511 * len(deltas),
        nll=nll,
        nll_error=0.04,
        ppl=float(np.exp(nll)),
        ppl_error=0.04 * float(np.exp(nll)),
        delta_nll=delta,
        delta_error=error,
        delta_low=delta - INTERVAL * error,
        delta_high=delta + INTERVAL * error,
        kl_mean=kl,
        kl_p99=kl * 8,
        kl_max=kl * 120,
        top1=1 - min(0.5, 4 * kl**0.7),
        delta_p=-delta * 0.1,
        weight_bytes=int(3_200_000 * float(bits) / 8),
        bits_per_weight=float(bits),
        kv_bytes=LAYERS * 2 * 64 * bits_of(specs["L0.k.all"]) // 8,
    )


@functools.cache
def figures(name, spec, num_heads):
    """Made-up figures of a site on a grid; equal in every call with the same arguments."""
    own = np.random.RandomState(int(digest(f"{name} {spec}")[:8], 16))
    heads, bits = num_heads if "/head" in spec else 1, bits_of(spec)
    return dict(
        spec=spec,
        scale=(own.uniform(1, 9, heads) / 2**bits).tolist(),
        zero=[int(2 ** (bits - 1)) if spec[0] == "u" else 0] * heads,
        saturation=own.uniform(0, 0.002, heads).round(5).tolist(),
        code_use=own.uniform(0.3, 0.99, heads).round(3).tolist(),
        sqnr=(6 * bits - own.uniform(4, 14, heads)).round(2).tolist(),
    )


def study(sites, rng):
    return dict(
        form=1,
        model=dict(name="study-llama", hash=digest("model")),
        texts=dict(
            calibration=[dict(file="calibration.txt", sha256=digest("c"), tokens=8192, windows=16)],
            evaluation=[dict(file="evaluation.txt", sha256=digest("e"), tokens=12288, windows=WINDOWS)],
        ),
        sites=sites,
        inside=["inputs", "attention", "swiglu"],
        baseline=dict(
            nll=float(base_nll().mean()),
            perplexity=float(np.exp(base_nll().mean())),
            perplexity_error=0.47,
            tokens=511 * WINDOWS,
            windows=WINDOWS,
            window_nll=base_nll().tolist(),
        ),
        calibration=dict(forwards=16),
        stats={s["name"]: stat(rng, s["name"]) for s in sites if not s["is_weight"]},
        versions=dict(lockstep="0.1.0", python="3.11.9", numpy="2.1.0"),
        threads=2,
    )


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def stat(rng, name):
    x = np.abs(rng.normal(0, 0.1, 4000)) if name.endswith(".p") else rng.normal(0.1, 1, 4000) ** 3
    counts, edges = np.histogram(x, 48)
    histogram = dict(edges=edges.round(4).tolist(), counts=counts.tolist())
    return dict(min=float(x.min()), max=float(x.max()), histogram=histogram)


def confirmations(trials):
    order = [0, 2, 1, 3, 4][: len(trials)]
    for rank, (row, place) in enumerate(zip(trials, order, strict=True), 1):
        equal = dict(equal=True) if rank != 4 else dict(equal=False, first=FIRST)
        yield dict(
            id=row["id"],
            parity=equal,
            fast_rank=rank,
            confirmed_rank=place + 1,
            metrics=row["metrics"],
            tokens=511 * WINDOWS,
            disagreement={"L0.q": [2100, 10**6], "L0.gate": [5100, 3 * 10**6], "L1.down": [0, 10**6]},
        )


FIRST = dict(window=3, token=17, score="nll", fast=2.25, prefill=2.2500002)
RECIPE = """model = "study-llama"

[calibrate]
text = "calibration.txt"
windows = 16

[evaluate]
text = "evaluation.txt"

[plan]
rules = [["*", "i16"]]

[[sweep]]
one_at_a_time = { sites = "coarse", spec = "u8" }

[confirm]
top = 5
"""

if __name__ == "__main__":
    print(write(pathlib.Path(sys.argv[1])))
