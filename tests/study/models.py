"""Small models for studies, and windows of tokens for them."""

import functools

import numpy as np

from lockstep.engine.model import load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.new_files import process_folder
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.models.cases import case, hybrid, windowed

CONFIGS = {
    "plain": case("llama", num_hidden_layers=2),
    "normed": case("qwen3", head_dim=32, num_hidden_layers=2),
    "biased": case("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_hidden_layers=2),
    "hybrid": hybrid(),
}
WINDOWS = {  # those of Gemma 3 are so sure of their tokens that no KL is above 0
    "window": case("mistral", sliding_window=9, num_hidden_layers=2),
    "some windows": windowed(),
    "windowed": windowed(num_hidden_layers=3),
}
SIXTEEN = {  # heads of 16, so that attention's scale is a power of two
    "normed 16": case("qwen3", head_dim=16, num_hidden_layers=2),
    "hybrid 16": hybrid(head_dim=16),
}


@functools.cache
def folder(name):
    """A model's folder, which exists until the process ends."""
    made, config = _root() / name, {**CONFIGS, **SIXTEEN, **WINDOWS}[name]
    return tiny.write(made, config, tiny.tensors(config, 5))


@functools.cache
def _root():
    return process_folder()


@functools.cache
def recorded(name, weights="f32", kv_dtype="f32"):
    """A loaded model that tests share and must not change."""
    return load_model(open_checkpoint(folder(name)), WeightStore(), weights, kv_dtype, 256)


def window(model, length, seed=0):
    """(Token ids, the token after each)."""
    ids = np.random.RandomState(seed).randint(0, model.config.vocab_size, length + 1).tolist()
    return ids[:-1], ids[1:]
