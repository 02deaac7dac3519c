"""Logits by llama.cpp for a GGUF file: `python llama_cpp_logits.py FILE.gguf OUT.npy ID ID ...`

Run by an interpreter that has llama-cpp-python; it imports nothing of Lockstep. Writes float32 [tokens, V].
"""

import sys

import llama_cpp as lib
import numpy as np


def logits(path, ids):
    """Logits of every position of a prompt, computed as one batch."""
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 512, 512, 512
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
    np.save(sys.argv[2], logits(sys.argv[1], [int(token) for token in sys.argv[3:]]))
