"""How the makers of a model want it sampled: generation_config.json, or the general.sampling keys of a GGUF file."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.request import MIN_TEMPERATURE, SamplingParams
from lockstep.weights.mapped import read_json_object

FILE = "generation_config.json"
# numbers that change nothing
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
KNOWN = (*NEUTRAL, "suppress_tokens")
DRAWS = NEUTRAL.keys() - {"repetition_penalty"}  # they say how a token is drawn, where tokens are drawn at all
CAUTIOUS = {"temperature": 0.7, "top_p": 0.95}  # for people who talk with a model whose makers say nothing
GGUF_KEYS = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}  # where the names are others
GGUF, GGUF_PREFIX = "the GGUF file's general.sampling", "general.sampling."
# what would change answers and is not done here -> the values that ask for nothing
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
Warn = Callable[..., None]  # called with a format and its arguments, as loggers are


def sampling_defaults(
    source: str, config: Mapping[str, Any], metadata: Mapping[str, Any], vocab_size: int, warn: Warn = log.warning
) -> dict[str, Any]:
    """The fields of SamplingParams that a model's makers set: {name: value}; empty where they are silent.

    source: "auto": config (its generation_config.json) or metadata (of its GGUF file); "none": they are not asked;
    else a folder or file with another generation_config.json. A value that is not allowed is ignored; warn is told,
    by its name. ValueError for a source that cannot be read.
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
    """The numbers that the settings of `lockstep chat` and of the page begin with: the defaults, or a cautious choice
    where those do not say how a token is drawn. All of NEUTRAL have a value."""
    made = {**NEUTRAL, **({} if DRAWS & defaults.keys() else CAUTIOUS), **defaults}
    return {name: made[name] for name in NEUTRAL}


def described(defaults: Mapping[str, Any]) -> str:
    """Defaults in words, such as "temperature 0.6, top_k 20"; suppressed tokens are only counted. Numbers that change
    nothing are left out, but a temperature."""
    words = [
        f"{name} {value:g}"
        for name, value in defaults.items()
        if name == "temperature" or value != NEUTRAL.get(name, value)
    ]
    suppressed = defaults.get("suppress_tokens")
    counted = [f"{len(suppressed)} token{'s' * (len(suppressed) != 1)} suppressed"] if suppressed else []
    return ", ".join([*words, *counted])


def _of_gguf(metadata: Mapping[str, Any], warn: Warn) -> dict[str, Any]:
    """The general.sampling keys under the names of generation_config.json, with values as JSON would have them."""
    given = {
        key.removeprefix(GGUF_PREFIX): _shortest(value)
        for key, value in metadata.items()
        if key.startswith(GGUF_PREFIX)
    }
    if given.get("penalty_last_n") == 0:
        given.pop("penalty_repeat", None)  # of no token at all
    elif given.get("penalty_last_n", -1) != -1 and given.get("penalty_repeat", 1) != 1:
        warn(
            "%s: penalty_last_n %.80r is ignored, repetition_penalty looks at the whole prompt and answer",
            GGUF,
            given["penalty_last_n"],
        )
    return {GGUF_KEYS.get(name, name): value for name, value in given.items()}


def _shortest(value: Any) -> Any:
    """A float that was stored with 32 bits as it was meant: 0.95, not 0.949999988; an array as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    with np.errstate(over="ignore"):  # one that 32 bits cannot hold becomes infinite, which is refused by name
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _checked(
    given: Mapping[str, Any], where: str, vocab_size: int, not_done: Mapping[str, tuple], warn: Warn
) -> dict[str, Any]:
    """The fields of `given` that can be had; warn is told of all others that would change answers."""
    made = {}
    for name in KNOWN:
        if given.get(name) is None:
            continue
        try:
            made |= _field(name, given[name], vocab_size)
        except ValueError as error:
            warn("%s: %s; ignored", where, error)
    for name, neutral in not_done.items():
        if given.get(name) is not None and not _is_one_of(given[name], neutral):
            warn("%s: %s %.80r is not supported; ignored", where, name, given[name])
    return _drawn(given.get("do_sample"), made, where, warn)


def _is_one_of(value: Any, neutral: tuple) -> bool:
    return isinstance(value, (int, float, str, list, dict)) and value in neutral


def _field(name: str, value: Any, vocab_size: int) -> dict[str, Any]:
    """A field as SamplingParams takes it. ValueError if that is not possible."""
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "top_k" and value == -1:
        value = 0
    if name == "temperature" and type(value) is float and 0 < value < MIN_TEMPERATURE:
        value = MIN_TEMPERATURE
    given: dict[str, Any] = {name: value}
    made = getattr(SamplingParams(**given), name)
    if name == "suppress_tokens":
        SamplingParams(suppress_tokens=made).check_vocabulary(vocab_size)
    return {name: float(made) if isinstance(NEUTRAL.get(name), float) else made}


def _drawn(do_sample: Any, made: dict[str, Any], where: str, warn: Warn) -> dict[str, Any]:
    """What do_sample makes of the fields: without sampling the most probable token is taken, however it was drawn."""
    if do_sample is False:
        return {"temperature": 0.0} | {name: value for name, value in made.items() if name not in DRAWS}
    if do_sample not in (None, True):
        warn("%s: do_sample: expected true or false, got %.80r; ignored", where, do_sample)
    return made
