"""Errors about files that hold long values are short, and still say what was wrong, got and allowed."""

import pytest

from lockstep.models.registry import model_config
from lockstep.weights.brief import MOST
from tests.models.cases import CASES, case

MANY = 100_000


@pytest.mark.parametrize(
    "config, begin, end",
    [
        (
            case("qwen3", layer_types=["full_attention"] * MANY),
            "config key 'layer_types': expected 3 of",
            "attention']",
        ),
        (case("llama", hidden_size=[1] * MANY), "config key 'hidden_size': expected a number, got [1, 1", "1, 1]"),
        (case("llama", rope_scaling={"rope_type": [1] * MANY}), "rope type [1, 1", "supported are default, linear"),
        ({**CASES["gemma3"], "rope_parameters": {"x" * MANY: {}}}, "config key 'rope_parameters': expected", "xx'"),
    ],
)
def test_a_long_value_loses_its_middle(config, begin, end):
    with pytest.raises(ValueError) as raised:
        model_config(config)
    said = str(raised.value)
    assert said.startswith(begin) and end in said[-400:] and "characters) ..." in said and len(said) <= MOST
