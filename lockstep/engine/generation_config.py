"""Sampling defaults that come with a model: its generation_config.json, or the general.sampling keys of its GGUF
file."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.request import MIN_TEMPERATURE, SamplingParams
from lockstep.weights.mapped import read_json_object

FILE = "generation_config.json"
# the values with which a parameter changes nothing
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
KNOWN = (*NEUTRAL, "suppress_tokens")
DRAWS = NEUTRAL.keys() - {"repetition_penalty"}  # the parameters by which a token is drawn from the probabilities
CAUTIOUS = {"temperature": 0.7, "top_p": 0.95}  # for chats with a model that brings no defaults
GGUF_KEYS = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}  # GGUF names that differ
GGUF, GGUF_PREFIX = "the GGUF file's general.sampling", "general.sampling."
# {parameter that is not supported here: the values with which it changes nothing}
NOT_DONE = {
    **dict.fromkeys(("typical_p", "num_beams", "guidance_scale"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "force_words_ids"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "top_h"), ()),
    "sequence_bias": ({}, []),
}
GGUF_NOT_DONE = {"xtc_probability": (0,), "mirostat": (0,), "sequence": ()}
log = logging.getLogger("lockstep.generation_config")
Warn = Callable[..., None]  # called as a logger is: with a format string and its arguments


def sampling_defaults(
    source: str, config: Mapping[str, Any], metadata: Mapping[str, Any], vocab_size: int, warn: Warn = log.warning
) -> dict[str, Any]:
    """The fields of SamplingParams for which a model brings defaults: {name: value}.

    source: "auto": config (the model's generation_config.json) or metadata (of its GGUF file); "none": no defaults;
    else a folder with another generation_config.json, or that file. A value that is not allowed is ignored with a
    warning. ValueError for a source that cannot be read.
    """
    if source == "none":
        return {}
    if source != "auto":
        path = Path(source)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"generation_config: expected auto, none or a folder with {FILE}, got {source!r:.200}")
        return _checked(read_json_object(path), str(path), vocab_size, NOT_DONE, warn)
    if any(key.startswith(GGUF_PREFIX) for key in metadata):
        return _checked(_of_gguf(metadata, warn), GGUF, vocab_size, GGUF_NOT_DONE, warn)
    return _checked(config, FILE, vocab_size, NOT_DONE, warn)


def for_talking(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The initial settings of `lockstep chat` and of the web page, a value for each name in NEUTRAL: the model's
    defaults, with CAUTIOUS values where these do not say how a token is drawn."""
    settings = {**NEUTRAL, **({} if DRAWS & defaults.keys() else CAUTIOUS), **defaults}
    return {name: settings[name] for name in NEUTRAL}


def described(defaults: Mapping[str, Any]) -> str:
    """Defaults in words, such as "temperature 0.6, top_k 20"; suppressed tokens are only counted. Values that change
    nothing are left out, except the temperature."""
    words = [
        f"{name} {value:g}"
        for name, value in defaults.items()
        if name == "temperature" or value != NEUTRAL.get(name, value)
    ]
    suppressed = defaults.get("suppress_tokens")
    counted = [f"{len(suppressed)} token{'s' * (len(suppressed) != 1)} suppressed"] if suppressed else []
    return ", ".join([*words, *counted])


def _of_gguf(metadata: Mapping[str, Any], warn: Warn) -> dict[str, Any]:
    """The general.sampling keys under the names of generation_config.json, with values of JSON's types."""
    given = {
        key.removeprefix(GGUF_PREFIX): _shortest(value)
        for key, value in metadata.items()
        if key.startswith(GGUF_PREFIX)
    }
    if given.get("penalty_last_n") == 0:
        given.pop("penalty_repeat", None)  # it looks at the last 0 tokens: no penalty
    elif given.get("penalty_last_n", -1) != -1 and given.get("penalty_repeat", 1) != 1:
        warn(
            "%s: penalty_last_n %.80r is ignored, repetition_penalty looks at the whole prompt and answer",
            GGUF,
            given["penalty_last_n"],
        )
    return {GGUF_KEYS.get(name, name): value for name, value in given.items()}


def _shortest(value: Any) -> Any:
    """A float that was stored as float32, as the shortest decimal: 0.95, not 0.949999988; an array as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, which is refused by name
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _checked(
    given: Mapping[str, Any], where: str, vocab_size: int, not_done: Mapping[str, tuple], warn: Warn
) -> dict[str, Any]:
    """The supported fields of `given`, with a warning for each other field that would change answers. where: the name
    of the source in warnings."""
    fields = {}
    for name in KNOWN:
        if given.get(name) is None:
            continue
        try:
            fields |= _field(name, given[name], vocab_size)
        except ValueError as error:
            warn("%s: %s; ignored", where, error)
    for name, neutral in not_done.items():
        if given.get(name) is not None and not _is_one_of(given[name], neutral):
            warn("%s: %s %.80r is not supported; ignored", where, name, given[name])
    return _drawn(given.get("do_sample"), fields, where, warn)


def _is_one_of(value: Any, neutral: tuple) -> bool:
    return isinstance(value, (int, float, str, list, dict)) and value in neutral


def _field(name: str, value: Any, vocab_size: int) -> dict[str, Any]:
    """{name: value}, the value as SamplingParams takes it. ValueError for a value that is not allowed."""
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "top_k" and value == -1:
        value = 0
    if name == "temperature" and type(value) is float and 0 < value < MIN_TEMPERATURE:
        value = MIN_TEMPERATURE
    given: dict[str, Any] = {name: value}
    checked = getattr(SamplingParams(**given), name)
    if name == "suppress_tokens":
        SamplingParams(suppress_tokens=checked).check_vocabulary(vocab_size)
    return {name: float(checked) if isinstance(NEUTRAL.get(name), float) else checked}


def _drawn(do_sample: Any, fields: dict[str, Any], where: str, warn: Warn) -> dict[str, Any]:
    """The fields under do_sample: if it is false, greedy, without the fields by which a token is drawn."""
    if do_sample is False:
        return {"temperature": 0.0} | {name: value for name, value in fields.items() if name not in DRAWS}
    if do_sample not in (None, True):
        warn("%s: do_sample: expected true or false, got %.80r; ignored", where, do_sample)
    return fields
