"""KV memory of models with windows at 32,768 tokens, as the engine takes it, against a count by hand."""

from typing import NamedTuple

import pytest

from lockstep.engine.cache.size import Needs, cache_bytes, page_bytes
from lockstep.engine.options import EngineOptions
from lockstep.models.recording import record_on
from lockstep.models.registry import model_config
from lockstep.models.shapes import AnyTensor
from tests.models.published import GPT_OSS_20B
from tests.models.published.gemma import GEMMA_2_27B, GEMMA_3_4B, GEMMA_4_31B, GEMMA_4_E2B

TOKENS, STEP = 32768, 512
NUMBER = 2  # bytes of bfloat16


class Layers(NamedTuple):
    """Layers that hold keys and values of their own, of one sort."""

    count: int
    num_kv_heads: int
    head_dim: int

    @property
    def token_bytes(self):
        """Keys and values of a token. Where a layer's values are its keys, the two differ nevertheless: keys are normed
        with a weight and turned, values are only normed; so both are held."""
        return self.count * self.num_kv_heads * self.head_dim * 2 * NUMBER


# config, layers that see all keys, layers with a window, the window; counted from what the models' makers published
COUNTED = {
    "GPT_OSS_20B": (GPT_OSS_20B, Layers(12, 8, 64), Layers(12, 8, 64), 128),
    "GEMMA_2_27B": (GEMMA_2_27B, Layers(23, 16, 128), Layers(23, 16, 128), 4096),
    "GEMMA_3_4B": (GEMMA_3_4B, Layers(5, 4, 256), Layers(29, 4, 256), 1024),
    "GEMMA_4_31B": (GEMMA_4_31B, Layers(10, 4, 512), Layers(50, 16, 256), 1024),
    # 20 of its 35 layers read keys and values of the first 15
    "GEMMA_4_E2B": (GEMMA_4_E2B, Layers(3, 1, 512), Layers(12, 1, 256), 512),
}


def program_of(raw):
    raw = {**raw.get("text_config", raw), "max_position_embeddings": TOKENS, "tie_word_embeddings": True}
    return record_on(AnyTensor(max_context=TOKENS), model_config(raw))[0]


@pytest.mark.parametrize("name", COUNTED)
def test_a_request_of_32k_tokens_takes_what_counting_says(name):
    """A windowed layer holds its window and the tokens of a step, in pages; within 5 % over all layers."""
    config, full, windowed, window = COUNTED[name]
    program, options = program_of(config), EngineOptions(max_requests=1, max_step_tokens=STEP)
    taken = cache_bytes(Needs(0, page_bytes(program), 0, False), TOKENS // 64, options)
    counted = full.token_bytes * TOKENS + windowed.token_bytes * (window + STEP - 1)
    assert counted <= taken <= 1.05 * counted
    assert page_bytes(program) == {0: 64 * full.token_bytes, window: 64 * windowed.token_bytes}
