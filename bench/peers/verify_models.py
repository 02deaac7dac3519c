#!/usr/bin/env python3
"""Does every GGUF hold the model the HF directory holds?  verify_models.py [MODEL ...]

transformers computes float32 logits (weights = the bf16 values) at every position of a 48-token prompt;
llama.cpp computes them from each GGUF; one JSON line per file: argmax agreement, cosine, max_abs_diff.
"""

import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from options import Parser, threads

N = 48
ap = Parser(__doc__)
ap.add_argument("models", nargs="*", default=["qwen3-0.6b", "qwen3.5-0.8b", "llama-3.2-1b"])
ap.add_argument("--formats", default="BF16,Q8_0,Q4_0,Q4_0-pure")
ap.add_argument("--threads", type=threads, default=2)
ap.add_argument("--stage", default="hf")
ap.add_argument("--tmp", default="")
a = ap.parse_args()
a.tmp = a.tmp or os.path.join(pc.peers_dir(), "verify")
for name in a.models:
    if not os.path.exists(pc.model_path(name, "hf")):
        ap.error(f"{name}: expected {pc.model_path(name, 'hf')}, see bench/peers/README.md")

if a.stage == "hf":
    os.makedirs(a.tmp, exist_ok=True)
    pc.enter("transformers", a.threads)
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    for name in a.models:
        m, info = transformers.AutoModelForCausalLM.from_pretrained(
            pc.model_path(name, "hf"), dtype=torch.float32, output_loading_info=True
        )
        bad = {
            k: sorted(v)[:4]
            for k, v in info.items()
            if k in ("missing_keys", "unexpected_keys", "mismatched_keys") and v
        }
        x = torch.tensor([pc.prompt(N)])
        with torch.inference_mode():
            y32 = m.eval()(x).logits[0].numpy()
            y16 = m.to(torch.bfloat16)(x).logits[0].float().numpy()
        np.save(os.path.join(a.tmp, name + ".npy"), y32)
        d = np.abs(y16 - y32).max()
        print(
            json.dumps(
                dict(
                    model=name,
                    form="transformers bf16 vs fp32",
                    argmax_agree=f"{(y16.argmax(-1) == y32.argmax(-1)).sum()}/{N}",
                    max_abs_diff=float(d),
                    logit_std=float(y32.std()),
                    echo=f"{(y32.argmax(-1) == x[0].numpy()).sum()}/{N}",
                    loading=bad or "clean",
                )
            ),
            flush=True,
        )
    env = {k: v for k, v in os.environ.items() if k != "PEER_PROCESS"}
    sys.exit(
        subprocess.call(
            [
                sys.executable,
                os.path.abspath(__file__),
                *a.models,
                "--stage",
                "ll",
                "--tmp",
                a.tmp,
                "--formats",
                a.formats,
                "--threads",
                str(a.threads),
            ],
            env=env,
        )
    )

pc.enter("llama.cpp", a.threads)
import numpy as np

for name in a.models:
    ref = np.load(os.path.join(a.tmp, name + ".npy"))
    for f in a.formats.split(","):
        L = pc.LlamaCpp(pc.model_path(name, f), n_ctx=256, threads=a.threads)
        L.decode([(t, i, 0, 1) for i, t in enumerate(pc.prompt(N))])
        y = np.stack([L.logits(i) for i in range(N)])
        L.close()
        cos = (y * ref).sum(-1) / np.sqrt((y * y).sum(-1) * (ref * ref).sum(-1))
        print(
            json.dumps(
                dict(
                    model=name,
                    form="llama.cpp " + f + " vs transformers fp32",
                    argmax_agree=f"{(y.argmax(-1) == ref.argmax(-1)).sum()}/{N}",
                    max_abs_diff=float(np.abs(y - ref).max()),
                    logit_std=float(ref.std()),
                    min_cosine=round(float(cos.min()), 5),
                )
            ),
            flush=True,
        )
