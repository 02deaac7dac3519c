"""Logits by llama.cpp for a GGUF file, in float32: `python cyllama_logits.py FILE.gguf OUT.npy WIDTH ID ID ...`

Run by an interpreter that has cyllama, which brings llama.cpp compiled; it imports nothing of Lockstep. WIDTH: of the
vocabulary. Writes float32 [tokens, WIDTH].
"""

import sys

import numpy as np
from cyllama.llama import llama_cpp as lib


def logits(path, width, ids):
    """Logits of every position of a prompt, computed as one batch with a cache of float32 and without flash
    attention."""
    # the binding asks its model for a width, which the model of this version does not have
    kind = type("Model", (lib.LlamaModel,), {"n_vocab": width})
    model = kind(path_model=path, params=lib.LlamaModelParams(), verbose=False)
    options = lib.LlamaContextParams()
    options.n_ctx, options.n_batch, options.n_ubatch = 256, 256, 256
    options.type_k = options.type_v = options.flash_attn_type = 0
    context = lib.LlamaContext(model=model, params=options, verbose=False)
    batch = lib.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, token in enumerate(ids):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return np.stack([np.array(context.get_logits_ith(i), np.float32)[:width] for i in range(len(ids))])


if __name__ == "__main__":
    path, out, width, *ids = sys.argv[1:]
    np.save(out, logits(path, int(width), [int(token) for token in ids]))
