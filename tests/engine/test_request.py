"""SamplingParams: the values that they allow, and the messages for all others."""

import numpy as np
import pytest

from lockstep.engine.request import SamplingParams

BAD = [
    ({"max_tokens": 0}, "max_tokens: expected an integer from 1"),
    ({"temperature": -1}, "temperature: expected a number from 0"),
    ({"temperature": 1e-05}, "temperature: expected 0 (greedy) or at least 0.001, got 1e-05"),
    ({"temperature": float("nan")}, "temperature: .*got nan"),
    ({"top_p": 0}, "top_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": 0.5}, "seed"),
    ({"top_k": True}, "top_k: expected an integer.*got True"),
    ({"stop": ("a", "")}, "stop: expected non-empty"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids: expected token ids"),
    ({"logprobs": 21}, "logprobs: expected 0 to 20 or None, got 21"),
    ({"logprobs": True}, "logprobs: expected 0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs: expected 0 to 20"),
    ({"min_tokens": -1}, "min_tokens: expected an integer from 0"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: expected at most max_tokens, 8, got 9"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.01 to 100, got 0"),
    ({"presence_penalty": 2.1}, "presence_penalty: expected a number from -2 to 2"),
    ({"frequency_penalty": "1"}, "frequency_penalty: .*got '1'"),
    ({"logit_bias": [(1, 2)]}, "logit_bias: expected {token id: number}"),
    ({"logit_bias": {"1": 2}}, "logit_bias: expected token ids as keys, got '1'"),
    ({"logit_bias": {-1: 2}}, "logit_bias: expected token ids"),
    ({"logit_bias": {4: 101}}, "logit_bias of token 4: expected a number from -100 to 100, got 101"),
    ({"logit_bias": {4: float("nan")}}, "logit_bias of token 4: .*got nan"),
    ({"logits_mask": 3}, "logits_mask: expected a function or None, got 3"),
    ({"n": 2.0}, "n: expected an integer from 1 to 128, got 2.0"),
    ({"seed": 10**400}, "seed: expected an integer from -"),
    ({"temperature": 10**400}, "temperature: expected a number from 0"),
    ({"stop_token_ids": 5}, "stop_token_ids: expected a list, got 5"),
    ({"suppress_tokens": [True]}, "suppress_tokens: expected token ids, got .True"),
    ({"suppress_tokens": 3}, "suppress_tokens: expected a list, got 3"),
    ({"stop_token_ids": None}, "stop_token_ids: expected a list, got None"),
    ({"stop": None}, "stop: expected a list, got None"),
    ({"stop": b"x"}, "stop: expected a list, got b'x'"),
    ({"logit_bias": {4: 10**400}}, "logit_bias of token 4: expected a number"),
    ({"pooling": np.array(["last", "mean"])}, "pooling: expected None or one of last, mean"),
    ({"ignore_eos": 1}, "ignore_eos: expected True or False"),
    ({"include_stop_str_in_output": None}, "include_stop_str_in_output: expected True"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=lambda v: str(v)[:40])
def test_a_bad_value_is_named_with_what_is_allowed(bad, message):
    with pytest.raises(ValueError, match=message.replace("(greedy)", r"\(greedy\)")):
        SamplingParams(**bad)


def test_lists_and_single_strings_are_taken():
    p = SamplingParams(stop="x", stop_token_ids=[3], logit_bias={1: 2, 5: np.float64(0.5)}, min_tokens=128)
    assert (p.stop, p.stop_token_ids, SamplingParams(stop=["x", "y"]).stop) == (("x",), (3,), ("x", "y"))
    assert hash(p) != hash(SamplingParams())


def test_a_later_change_of_a_bias_changes_no_params():
    bias = {1: 2.0}
    p = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert p.logit_bias == {1: 2.0}
