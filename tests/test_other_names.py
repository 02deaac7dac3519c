"""Options that there are not: what is said of them in Python."""

import inspect
import re

import pytest

from lockstep import LLM, SamplingParams
from lockstep.loading import LoadedModel
from lockstep.other_names import HERE, OF_GPUS, OTHER_NAMES, near


@pytest.mark.parametrize(("options", "said"), [
    (dict(n_ctx=2048), "LLM has no option n_ctx: it is called max_context here"),
    (dict(threads=1, dtype="bf16"), "LLM has no option dtype: it is called weights here"),
    (dict(n_gpu_layers=99), "LLM has no option n_gpu_layers: Lockstep computes on CPUs"),
    (dict(thread=1), "LLM has no option thread: did you mean threads?"),
    (dict(kv_dtyp="q8"), "LLM has no option kv_dtyp: did you mean kv_dtype?"),
    (dict(temperature=0.5), "LLM has no option temperature: temperature is a field of SamplingParams, which the calls"),
    (dict(max_new_tokens=5), "LLM has no option max_new_tokens: max_tokens is a field of SamplingParams"),
    (dict(bogus=1), "LLM has no option bogus: expected some of model, weights, kv_dtype, max_context, "),
])  # fmt: skip
def test_an_option_that_there_is_not(options, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        LLM(**options)


def test_two_arguments_without_a_name():
    with pytest.raises(TypeError, match="LLM: expected model alone without a name, and options by name, such as weig"):
        LLM("org/model", "q8_0")


def test_the_class_that_was_called_is_named_and_its_options_can_be_read():
    with pytest.raises(TypeError, match=r"^LoadedModel has no option n_ctx"):
        LoadedModel(n_ctx=1)
    assert "max_context" in inspect.signature(LLM).parameters


def test_other_names_are_no_names_of_ours_and_lead_to_some():
    ours = {*inspect.signature(LLM).parameters, *inspect.signature(SamplingParams).parameters}
    assert OTHER_NAMES.keys() <= ours and not ours & (HERE.keys() | OF_GPUS)


@pytest.mark.parametrize(("name", "names", "expected"), [
    ("temp", ["help", "stop", "temperature"], ["temperature"]),
    ("prot", ["host", "port", "rope"], ["port"]),
    ("gpu", ["op", "help"], []),
    ("n-predict", ["receipt", "prompt"], []),
    ("stream", ["threads", "seed"], []),
    ("tempersture", ["temperature", "threads"], ["temperature"]),
    ("s", ["stop", "seed"], []),
])  # fmt: skip
def test_only_what_is_near_is_named(name, names, expected):
    assert near(name, names) == expected
