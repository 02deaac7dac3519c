"""Logits by llama.cpp for a GGUF file: `python llama_cpp_logits.py FILE.gguf OUT.npy [--float32] ID ID ...`

Run by an interpreter that has llama-cpp-python; it imports nothing of Lockstep. --float32: with a cache of float32 and
without flash attention. Writes float32 [tokens, V].
"""

import sys

import llama_cpp as lib
import numpy as np


def logits(path, ids, is_float32=False):
    """Logits of every position of a prompt, computed as one batch."""
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 512, 512, 512
    if is_float32:
        options.type_k = options.type_v = options.flash_attn_type = 0
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    if lib.llama_decode(context, batch):
        sys.exit(f"llama.cpp cannot run {path}")
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (width,)).copy() for i in range(len(ids))]
    return np.stack(rows)


if __name__ == "__main__":
    path, out, *ids = sys.argv[1:]
    np.save(out, logits(path, [int(token) for token in ids if token != "--float32"], "--float32" in ids))
