#!/usr/bin/env python3
"""Do llama.cpp and Lockstep compute the same model from each file of make_layers.py?  verify_layers.py [FILE ...]

Logits at every position of one prompt, longer than gpt-oss' window; one JSON line per file: positions of the same
argmax, the largest difference of logits, the smallest cosine of two rows of them. Where an argmax differs, both tokens
must be nearly as likely: llama.cpp's logits of the two differ by at most five times what its row and ours differ by in
the root mean square (both round activations to 8 bits, in ways of their own). Where that rounding chooses another
expert, logits differ more: in two of a hundred positions the cosine may be lower.
Exits with 1 if a file does not agree. --weights f32: Lockstep without rounding activations.

--referee: who is nearer to the model? The referee is Lockstep in float32, on the decoded weights, which tests compare
with gguf's and transformers'. One JSON line per file: the root mean square of what each engine's logits differ by from
the referee's, in standard deviations of these, and positions of the same argmax. Mixtures have few experts, so that
they fit into memory (make_layers.py makes them by name). Exits with 1 if Lockstep's error is above 1.1 times
llama.cpp's.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import numpy as np
import peers_common as pc
from layer_shapes import FEW_EXPERTS, FILES
from options import Parser, threads

NUM_TOKENS = 160
MIN_COSINE, LOW_COSINES, MAX_MARGIN = 0.99, 0.02, 5
MAX_ERROR = 1.1  # Lockstep's against the referee, in llama.cpp's
IN_FLOAT32 = {name: FILES[name] for name in ("qwen3-0.6b-blocks", "gemma4-e4b-layers")} | FEW_EXPERTS


def paths(names, files=FILES):
    known = [pc.model_path(name, mixture) for name, (_, mixtures) in files.items() for mixture in mixtures]
    return [path for path in known if not names or any(name in path for name in names)]


def made(parser, names, files=FILES):
    """The `paths` of some files, if they are there; else ends the script."""
    chosen = paths(names, files)
    if not chosen:
        parser.error(
            f"files {' '.join(names)}: expected parts of names of {', '.join(map(os.path.basename, paths([], files)))}"
        )
    for path in chosen:
        if not os.path.exists(path):
            parser.error(f"{path}: there is no such file, make_layers.py makes it")
    return chosen


def vocabulary(path):
    files = FILES | FEW_EXPERTS
    return next(shape.rows for name, (shape, _) in files.items() if os.path.basename(path).startswith(name))


def prompt(path, num_tokens=NUM_TOKENS, seed=0):
    return pc.prompt(num_tokens, seed, vocabulary(path))


def llama_cpp_logits(path, out, threads):
    """Writes float32 [tokens, V]."""
    ids = prompt(path)
    engine = pc.LlamaCpp(path, n_ctx=512, threads=threads)
    engine.decode([(token, i, 0, 1) for i, token in enumerate(ids)])
    np.save(out, np.stack([engine.logits(i) for i in range(len(ids))]))
    engine.close()


def lockstep_logits(path, threads, weights, kv_dtype="f32"):
    """float32 [tokens, V]"""
    from lockstep.engine.cache.pages import everywhere, pages_for
    from lockstep.engine.model import load_model
    from lockstep.engine.runner import Limits, Runner, Span
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.runtime.threads import Team
    from lockstep.weights.store import WeightStore

    ids, team = prompt(path), Team(threads)
    model = load_model(open_checkpoint(pathlib.Path(path)), WeightStore(), weights, kv_dtype, 512)
    runner = Runner(model, team, Limits(len(ids), 1, pages_for(len(ids)) + 1, len(ids)))
    pages = everywhere(range(pages_for(len(ids))))
    logits = runner.step([Span(ids, 0, pages, 0, {row: {} for row in range(len(ids))})])[2].copy()
    team.close()
    return logits


def compare(path, ours, theirs):
    """The line of JSON for a file; is_same: whether the two engines agree."""
    chosen, expected = ours.argmax(-1), theirs.argmax(-1)
    rows, worst = np.arange(len(ours)), np.abs(ours - theirs).max(-1)
    margins = theirs[rows, expected] - theirs[rows, chosen]
    noise = np.sqrt(((ours - theirs) ** 2).mean(-1))
    cosines = (ours * theirs).sum(-1) / np.sqrt((ours**2).sum(-1) * (theirs**2).sum(-1))
    return dict(
        file=os.path.basename(path),
        argmax_agree=f"{int((chosen == expected).sum())}/{len(rows)}",
        largest_margin=round(float((margins / np.maximum(noise, 1e-9)).max()), 2),
        max_abs_diff=round(float(worst.max()), 4),
        logit_std=round(float(theirs.std()), 4),
        min_cosine=round(float(cosines.min()), 5),
        median_cosine=round(float(np.median(cosines)), 5),
        is_same=bool((margins <= MAX_MARGIN * noise).all() and (cosines < MIN_COSINE).mean() <= LOW_COSINES),
    )


def check(path, threads=2, weights="auto"):
    theirs = in_its_own_process(path, threads)
    return compare(path, lockstep_logits(path, threads, weights), theirs)


def in_its_own_process(path, threads):
    """llama.cpp's logits."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "logits.npy")
        command = [sys.executable, os.path.abspath(__file__), path, "--only-llama-cpp", out, "--threads", str(threads)]
        subprocess.run(command, check=True)
        return np.load(out)


def refereed(path, threads):
    """The line of JSON for a file, of `--referee`."""
    engines = {"lockstep": lockstep_logits(path, threads, "auto"), "llama.cpp": in_its_own_process(path, threads)}
    exact = lockstep_logits(path, threads, "f32").astype(np.float64)
    errors = {name: float(np.sqrt(((logits - exact) ** 2).mean()) / exact.std()) for name, logits in engines.items()}
    same = {name: int((logits.argmax(-1) == exact.argmax(-1)).sum()) for name, logits in engines.items()}
    return dict(
        file=os.path.basename(path),
        errors={name: round(error, 5) for name, error in errors.items()},
        argmax_agree={name: f"{count}/{len(exact)}" for name, count in same.items()},
        is_near=errors["lockstep"] <= MAX_ERROR * errors["llama.cpp"],
    )


def note_of(path):
    return pathlib.Path(path).with_suffix(".verified.json")


def agreed(path, threads=2):
    """Whether both engines agree on this very file: as noted beside it, or found now and noted."""
    about = dict(bytes=os.path.getsize(path), modified=os.path.getmtime(path))
    note = note_of(path)
    if not note.exists() or {k: v for k, v in json.loads(note.read_text()).items() if k in about} != about:
        note.write_text(json.dumps(check(path, threads) | about) + "\n")
    return json.loads(note.read_text())["is_same"]


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", help="parts of file names; all files if none is given")
    parser.add_argument("--threads", type=threads, default=2)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--referee", action="store_true")
    parser.add_argument("--only-llama-cpp", metavar="OUT", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only_llama_cpp:
        pc.enter("llama.cpp", a.threads)
        return llama_cpp_logits(a.files[0], a.only_llama_cpp, a.threads)
    if a.referee:
        near = []
        for path in made(parser, a.files, IN_FLOAT32):
            line = refereed(path, a.threads)
            near.append(line["is_near"])
            print(json.dumps(line), flush=True)
        return 0 if all(near) else 1
    lines = []
    for path in made(parser, a.files):
        if a.weights == "auto":
            note_of(path).unlink(missing_ok=True)
            agreed(path, a.threads)
            lines.append(json.loads(note_of(path).read_text()))
        else:
            lines.append(check(path, a.threads, a.weights))
        print(json.dumps(lines[-1]), flush=True)
    return 0 if all(line["is_same"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
