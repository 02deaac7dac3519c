"""Many requests at once through one engine, by its own interpreter; one JSON line. Started by rivals_serving.py.

    python bench/peers/serving_peers.py lockstep|vllm|openvino|llama.cpp MODEL --requests 8

All requests arrive together; an engine batches them as it likes. Every engine gets the same prompts, generates the
same number of tokens greedily and may take 512 tokens a step. llama.cpp's library has batches but no scheduler, so
it gets this project's rule: one token for each running answer, then chunks of prompts.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from options import Parser, whole_number

STEP_TOKENS, SHORTEST = 512, 32  # SHORTEST: tokens of the shortest prompt
now = time.perf_counter


def workload(num_requests, seed, longest):
    """Prompts of SHORTEST to `longest` tokens, log-uniform."""
    import numpy as np

    rng = np.random.default_rng([11, seed])
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(longest), num_requests)).astype(int)
    return [rng.integers(0, 100000, n).tolist() for n in lengths]


class Lockstep:
    def __init__(self, path, num_requests, room):
        from lockstep import LLM, SamplingParams

        self.params = SamplingParams
        self.engine = LLM(
            path,
            max_requests=num_requests,
            max_context=room,
            max_step_tokens=STEP_TOKENS,
            kv_tokens=num_requests * room,
            prefix_cache=False,
        ).engine

    def run(self, prompts, tokens):
        params, started = self.params(max_tokens=tokens, ignore_eos=True), now()
        made, first = [self.engine.add(p, params) for p in prompts], {}
        while self.engine.has_work:
            for request in self.engine.step():
                first.setdefault(request.id, now() - started)
        assert all(len(r.output_ids) == tokens for r in made)
        return now() - started, list(first.values())


class Vllm:
    def __init__(self, path, num_requests, room):
        from vllm import LLM, SamplingParams

        self.params, self.count = SamplingParams, 0
        self.engine = LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=room,
            max_num_seqs=num_requests,
            max_num_batched_tokens=max(STEP_TOKENS, room),
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine

    def run(self, prompts, tokens):
        params = self.params(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started, first = now(), {}
        for prompt in prompts:
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.outputs and len(output.outputs[0].token_ids):
                    first.setdefault(output.request_id, now() - started)
        return now() - started, list(first.values())


class OpenVino:
    def __init__(self, path, num_requests, room):
        import openvino_genai as genai

        config = genai.SchedulerConfig()
        config.max_num_batched_tokens, config.max_num_seqs, config.cache_size = STEP_TOKENS, num_requests, 6
        config.dynamic_split_fuse, config.enable_prefix_caching = True, False
        self.genai, self.count = genai, 0
        self.pipe = genai.ContinuousBatchingPipeline(path, config, "CPU", {"INFERENCE_NUM_THREADS": 2})

    def run(self, prompts, tokens):
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = tokens, True
        started, first, handles = now(), {}, []
        for prompt in prompts:
            self.count += 1
            handles.append(self.pipe.add_request(self.count, openvino.Tensor(np.array([prompt])), config))
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            for i, handle in enumerate(handles):
                if i not in first and handle.can_read():
                    first[i] = now() - started
        return now() - started, list(first.values())


class LlamaCpp:
    def __init__(self, path, num_requests, room):
        import peers_common

        self.context = peers_common.LlamaCpp(
            path, -(-room // 256) * 256 * num_requests, num_requests, STEP_TOKENS, STEP_TOKENS, threads=2
        )

    def run(self, prompts, tokens):
        self.context.clear()
        started, first = now(), {}
        known, done, left = [list(p) for p in prompts], [0] * len(prompts), [tokens] * len(prompts)
        while any(left):
            self._step(known, done, left)
            for s in range(len(prompts)):
                if left[s] < tokens:
                    first.setdefault(s, now() - started)
        return now() - started, list(first.values())

    def _step(self, known, done, left):
        items, rows = [], []
        order = sorted((s for s in range(len(known)) if left[s]), key=lambda s: len(known[s]) - done[s] > 1)
        for s in order:
            for position in range(done[s], min(len(known[s]), done[s] + STEP_TOKENS - len(items))):
                is_last = position == len(known[s]) - 1
                rows += [(s, len(items))] * is_last
                items.append((known[s][position], position, s, is_last))
                done[s] = position + 1
        self.context.decode(items)
        for s, row in rows:
            known[s].append(int(self.context.logits(row).argmax()))
            left[s] -= 1


ENGINES = {"lockstep": Lockstep, "vllm": Vllm, "openvino": OpenVino, "llama.cpp": LlamaCpp}


def main():
    parser = Parser(__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_counts(requests=8, tokens=64, runs=1)
    parser.add_argument("--longest", type=whole_number(SHORTEST), default=512, help="tokens of the longest prompt")
    a = parser.parse_args()
    engine = ENGINES[a.engine](a.model, a.requests, a.longest + a.tokens + 8)
    engine.run(workload(min(2, a.requests), 0, 64), 4)
    for seed in range(1, a.runs + 1):
        prompts = workload(a.requests, seed, a.longest)
        seconds, first = engine.run(prompts, a.tokens)
        print(
            json.dumps(
                dict(
                    seconds=seconds,
                    first=first,
                    prompt_tokens=sum(map(len, prompts)),
                    output_tokens=a.requests * a.tokens,
                )
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
