"""The models with which the promise is tested: tiny random ones, and the one that comes with the package."""

from dataclasses import dataclass

import numpy as np

from lockstep.engine.model import load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.models.cases import CASES as CASES_OF_MODELS
from tests.models.cases import (
    EXPERTS,
    GROWING,
    MULTIPLIERS,
    PER_LAYER,
    capped,
    case,
    hybrid,
    hybrid_experts,
    windowed,
)
from tests.promise.trace import Sequence, trace

LONG = 2150  # past two spans of attention (1024 keys each)
CONFIGS = {
    "qwen3_5": hybrid(max_position_embeddings=4096),
    "qwen3": case("qwen3", head_dim=32, max_position_embeddings=4096),
    "qwen2": case("qwen2", max_position_embeddings=4096),
    "mistral_window": case("mistral", sliding_window=70, max_position_embeddings=4096),
    "gemma2": capped(sliding_window=70, max_position_embeddings=4096),
    "gemma4": {**PER_LAYER, "sliding_window": 70, "max_position_embeddings": 4096},
    "gemma3n": {**CASES_OF_MODELS["gemma3n"], "sliding_window": 70, "max_position_embeddings": 4096},
    "gemma4_experts": {**EXPERTS, "sliding_window": 70, "max_position_embeddings": 4096},
    "gemma3": windowed(sliding_window=70, max_position_embeddings=4096),
    "gpt_oss": {**CASES_OF_MODELS["gpt_oss"], "sliding_window": 70, "max_position_embeddings": 4096},
    "qwen3_5_moe": hybrid_experts(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], max_position_embeddings=4096
    ),
    "ministral3": case(
        "ministral3", head_dim=32, max_position_embeddings=4096, rope_theta=None, rope_parameters=GROWING
    ),
    "granite": case("granite", head_dim=32, max_position_embeddings=4096, **MULTIPLIERS),
    "olmo3": {**CASES_OF_MODELS["olmo3"], "sliding_window": 70, "max_position_embeddings": 4096},
    "qwen3_windows": case(
        "qwen3",
        head_dim=32,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=24,
        max_position_embeddings=4096,
    ),
}


@dataclass(frozen=True)
class Case:
    """A model in one weight format and one KV format. lengths: tokens of its sequences."""

    config: str
    weights: str
    kv_dtype: str
    lengths: tuple = (1, 2, 65, 130, 300)

    def __str__(self):
        return f"{self.config}-{self.weights}-kv_{self.kv_dtype}"


CASES = [
    Case("qwen3_5", "f32", "f32", (1, 3, 64, 200, LONG)),
    Case("qwen3_5", "bf16", "bf16"),
    Case("qwen3_5", "q8_0", "bf16"),
    Case("qwen3_5", "q4_0", "f32"),
    Case("qwen3", "q8_0", "bf16", (1, 64, 129, LONG)),
    Case("qwen3", "f32", "bf16"),
    Case("mistral_window", "q4_0", "bf16"),
    Case("mistral_window", "bf16", "f32", (5, 63, 260)),
    Case("gemma2", "q8_0", "bf16", (5, 150)),
    Case("gemma4", "q8_0", "bf16", (1, 71, 200)),
    Case("gemma4", "f32", "q8", (5, 130)),
    Case("gemma4_experts", "f32", "f32", (5, 130)),
    Case("gemma3n", "q8_0", "bf16", (1, 71, 150)),
    Case("gemma3", "f32", "f32", (1, 71, 200)),
    Case("gemma3", "q4_0", "q8", (5, 150)),
    Case("gpt_oss", "f32", "bf16", (1, 71, 200)),
    Case("qwen3_5_moe", "q8_0", "bf16", (1, 66, 150)),
    Case("ministral3", "f32", "q8", (5, 150)),
    Case("granite", "q8_0", "bf16", (1, 150)),
    Case("olmo3", "bf16", "bf16", (5, 150)),
    Case("bundled", "auto", "bf16", (1, 17, 150)),
    Case("bundled", "f32", "f32", (2, 90)),
    Case("bundled", "q8_0", "bf16", (1, 66, 150)),
    Case("bundled", "q4_0", "bf16", (3, 140)),
    Case("qwen3_5", "q8_0", "q8", (1, 3, 64, 200, LONG)),
    Case("qwen3", "q4_0", "q8"),
    Case("qwen2", "f32", "q8"),
    Case("mistral_window", "bf16", "q8", (5, 63, 260)),
    Case("bundled", "auto", "q8", (1, 66, 150)),
]


def load(case, folder, max_context=2304):
    """The model of a case; tiny ones are written to the folder first."""
    if case.config == "bundled":
        path = resolve_model(None)
    else:
        config = CONFIGS[case.config]
        path = tiny.write(folder, config, tiny.tensors(config, 11))
    return load_model(open_checkpoint(path), WeightStore(), case.weights, case.kv_dtype, max_context)


def library(model, lengths):
    """[(Sequence, Trace), ...]: sequences of random token ids of these lengths, each with the results of running
    alone."""
    made = []
    for i, length in enumerate(lengths):
        ids = np.random.RandomState(i).randint(0, model.config.vocab_size, length).tolist()
        sequence = Sequence(f"sequence of {length}", ids, seed=i)
        made.append((sequence, trace(model, sequence)))
    return made
