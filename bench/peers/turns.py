#!/usr/bin/env python3
"""Engines that take turns: each is a process that holds one file and runs prompts when it is told to.

  turns.py ENGINE FILE [--threads 2]      (a worker; ENGINE: llama.cpp or lockstep)

A worker reads lines of JSON, {"prompts": [[id, ...], ...], "num_new": n}, and answers each with a line: the seconds
until all prompts have a token, the seconds of the tokens after that, their number, and how many cores others used.
"""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import peers_common as pc
from options import Parser, file, threads

CONTEXT, REQUESTS = 1024, 8


class Engine:
    """A worker's process, seen from the one that gives turns."""

    def __init__(self, name, path, threads=2):
        command = [sys.executable, os.path.abspath(__file__), name, path, "--threads", str(threads)]
        self.name, self.path = name, path
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def run(self, prompts, num_new):
        self._process.stdin.write(json.dumps(dict(prompts=prompts, num_new=num_new)) + "\n")
        self._process.stdin.flush()
        return SimpleNamespace(**self._answer())

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended while it ran {self.path}")
        return json.loads(line)


def llama_cpp(path, threads):
    """A function (prompts, num_new) -> (seconds of first tokens, seconds of the others, their number)."""
    from bench_peers import Llama

    class OneContext(Llama):
        """The same context for one sequence and for several, since a new one would load the file again."""

        def ctx(self, num_sequences):
            if self.cur is None:
                sizes = dict(n_ctx=REQUESTS * CONTEXT, n_seq_max=REQUESTS)
                self.cur = (REQUESTS, pc.LlamaCpp(self.a.path, **sizes, **self.kw))
            return self.cur[1]

    sizes = dict(prefill=[512], batch=[REQUESTS], decode_prompt=128, decode_tokens=64)
    engine = OneContext(
        SimpleNamespace(path=path, threads=threads, ubatch=512, flash_attn=-1, kv_dtype="bf16", **sizes)
    )
    engine.ctx(1)

    def run(prompts, num_new):
        return *engine.run(prompts, num_new), len(prompts) * (num_new - 1)

    return run


def lockstep(path, threads):
    """The same function."""
    from lockstep import LLM, SamplingParams

    sizes = dict(max_requests=REQUESTS, max_context=CONTEXT, max_step_tokens=512)
    engine = LLM(path, threads=threads, prefix_cache=False, **sizes).engine

    def run(prompts, num_new):
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        started = time.perf_counter()
        requests = [engine.add(ids, params) for ids in prompts]
        while not all(request.output_ids for request in requests):
            engine.step()
        first, num = time.perf_counter(), sum(len(request.output_ids) for request in requests)
        while engine.has_work:
            engine.step()
        return first - started, time.perf_counter() - first, len(prompts) * num_new - num

    return run


def main():
    parser = Parser(__doc__)
    parser.add_argument("engine", choices=["llama.cpp", "lockstep"])
    parser.add_argument("path", type=file)
    parser.add_argument("--threads", type=threads, default=2)
    a = parser.parse_args()
    pc.enter(a.engine, a.threads)
    started = time.perf_counter()
    run = {"llama.cpp": llama_cpp, "lockstep": lockstep}[a.engine](str(a.path), a.threads)
    print(json.dumps(dict(seconds_to_load=round(time.perf_counter() - started, 2))), flush=True)
    gate = pc.Gate(patience=0)
    for line in sys.stdin:
        asked = json.loads(line)
        (first, others, num), foreign = gate.run(lambda asked=asked: run(asked["prompts"], asked["num_new"]))
        print(json.dumps(dict(first=first, others=others, num=num, foreign=foreign)), flush=True)


if __name__ == "__main__":
    main()
