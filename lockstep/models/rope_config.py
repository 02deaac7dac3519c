"""The part of config.json that describes the rotary position embedding (rope)."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from lockstep.models.config import Config, flag, need
from lockstep.models.model_config import Heads, Layer, ModelConfig, Rope
from lockstep.ops.attention.rope import Growth, RopeScaling

ROPES = ("auto", "short")  # which factors a model with longrope runs with: those of its context, or the short ones
OLD_CONTEXT = "original_max_position_embeddings"
YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_KEYS = {  # by rope type: required parameters, and optional ones
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (OLD_CONTEXT,)),
    "yarn": (("factor",), (OLD_CONTEXT, *YARN)),
    "proportional": ((), ("factor",)),
    "longrope": (("short_factor", "long_factor"), (OLD_CONTEXT, "factor", "attention_factor")),
}
FACTORS = ("short_factor", "long_factor")  # lists, with a number for each pair of channels
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
LEAST, MOST = 1e-6, 1e12  # within which tables stay finite
ALSO_NAMED = {"type": "rope_type", "rope_type": "type"}
BETA = "llama_4_scaling_beta"
MROPE = {"mrope_section", "mrope_interleaved"}  # for text all three position components are equal


def rope(
    config: Config,
    head_dim: int,
    theta: float = 10000.0,
    partial: float | None = None,
    ignored: Set[str] = frozenset(),
) -> Rope:
    """The rope that a config describes: in rope_parameters (transformers 5), or rope_theta and rope_scaling (before).

    theta, partial: the family's defaults for rope_theta and partial_rotary_factor; partial None: the family always
    rotates all channels. ignored: parameters that do not matter to text.
    """
    given = _one_of(_rope_object(config, "rope_scaling"), _rope_object(config, "rope_parameters"))
    rope_type = given.get("rope_type") or given.get("type") or "default"
    rope_type = "default" if rope_type == "mrope" and ignored >= MROPE else rope_type
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    required, allowed = ROPE_KEYS[rope_type]
    unknown = {k for k, v in given.items() if v is not None} - ROPE_COMMON - ignored - set(required) - set(allowed)
    if unknown:
        raise ValueError(f"rope parameter {sorted(unknown)[0]!r} is not supported with rope type {rope_type!r}")
    named = [k for k in (*required, *allowed) if k in required or given.get(k) is not None]
    numbers: dict[str, Any] = {k: _rope_number(given, k) for k in named if k not in FACTORS}
    rope_theta = _first("rope_theta", theta, given, config)
    if rope_type == "yarn" and rope_theta <= 1:
        raise ValueError(f"rope parameter 'rope_theta': expected more than 1 with rope type 'yarn', got {rope_theta}")
    share = _first("partial_rotary_factor", partial or 1.0, given, config)
    if rope_type == "proportional":
        numbers["partial_rotary_factor"], share = _turning(head_dim, share), 1.0
    if partial is None and share != 1:
        raise ValueError(f"rope parameter 'partial_rotary_factor': {share} is not supported, only 1")
    rope_dim, numbers = _rope_dim(head_dim, share), _with_old_context(config, rope_type, numbers)
    if rope_type != "longrope":
        return Rope(rope_dim, rope_theta, RopeScaling(kind=rope_type, **numbers))
    factors = {k: _rope_numbers(given, k, rope_dim // 2) for k in FACTORS}
    numbers = _longrope(config, factors, numbers)
    return Rope(rope_dim, rope_theta, RopeScaling(kind=rope_type, **numbers), factors["short_factor"])


def ropes_by_type(config: Config, head_dim: int, thetas: Mapping[str, float]) -> dict[str, Rope]:
    """The rope of each layer type. In transformers 5 rope_parameters has an object for each type; before, rope_theta
    and rope_scaling describe layers that see all keys, rope_local_base_freq layers with a window.

    thetas: the default rope_theta of "full_attention" and of "sliding_attention".
    """
    given, ropes = _rope_object(config, "rope_parameters"), {}
    if given:
        _one_of(_rope_object(config, "rope_scaling"), given.get("full_attention"))
    wrong = next((t for t, parameters in given.items() if t not in thetas or not isinstance(parameters, dict)), None)
    if wrong is not None:
        raise ValueError(
            f"config key 'rope_parameters': expected an object for each of {', '.join(thetas)}, got {wrong!r}"
        )
    old = {
        "full_attention": {k: config.get(k) for k in ("rope_theta", "rope_scaling")},
        "sliding_attention": {"rope_theta": config.get("rope_local_base_freq")},
    }
    for layer_type, theta in thetas.items():
        context = {key: config.get(key) for key in (OLD_CONTEXT, "max_position_embeddings")}
        own = {**old[layer_type], "rope_parameters": given.get(layer_type)}
        ropes[layer_type] = rope({**context, **own}, head_dim, theta)
    return ropes


def growth(config: Config) -> Growth | None:
    """How queries grow with their position: llama_4_scaling_beta of rope_parameters, and the context of the first
    training, as the rope has it; None for a beta of 0."""
    given = _rope_object(config, "rope_parameters")
    if given.get(BETA) == 0:
        return None
    return Growth(_rope_number(given, BETA), int(_rope_number({**given, **_outer_context(config)}, OLD_CONTEXT)))


def with_rope(config: ModelConfig, rope: str) -> ModelConfig:
    """The config, or, if `rope` is "short", that of the model with the short factors of its ropes, whose context is the
    one that these are for: transformers takes no others for such a text. ValueError for a model without them.
    """
    if rope not in ROPES:
        raise ValueError(f"rope {rope!r}: expected one of {', '.join(ROPES)}")
    if rope == "auto":
        return config
    layers = tuple(_with_short_factors(layer) for layer in config.layers)
    contexts = {heads.rope.scaling.original_max_position_embeddings for heads in _of_longrope(config.layers)}
    if not contexts:
        raise ValueError(
            f"rope 'short': expected a model whose rope has short and long factors (longrope, as of Phi), but "
            f"{config.model_type} has none; allowed is 'auto'"
        )
    return replace(config, layers=layers, max_positions=min(config.max_positions, *contexts))


def _of_longrope(layers: Iterable[Layer]) -> list[Any]:
    """The heads whose rope has short factors."""
    heads = [layer.mixer for layer in layers if isinstance(layer.mixer, Heads)]
    return [each for each in heads if each.rope is not None and each.rope.short_factors]


def _with_short_factors(layer: Layer) -> Layer:
    """The layer with the short factors of its rope, if this has any."""
    for heads in _of_longrope([layer]):
        scaling = replace(heads.rope.scaling, factors=heads.rope.short_factors)
        return replace(layer, mixer=replace(heads, rope=replace(heads.rope, scaling=scaling)))
    return layer


def _rope_dim(head_dim: int, share: float) -> int:
    """How many of a head's channels are rotated."""
    rope_dim = int(head_dim * share)
    if rope_dim % 2 or not 0 < rope_dim <= head_dim:
        raise ValueError(
            f"config key 'partial_rotary_factor': {share} of {head_dim} channels is not supported: it must "
            f"be an even number up to {head_dim}"
        )
    return rope_dim


def _turning(head_dim: int, share: float) -> float:
    """The share of a head's channels whose pairs turn; ValueError unless they are some of them, and not more."""
    if not 2 <= int(head_dim * share) <= head_dim:
        raise ValueError(f"rope parameter 'partial_rotary_factor': {share} of {head_dim} channels is not supported")
    return share


def _outer_context(config: Config) -> Config:
    """The context of the first training, where it stands beside the rope's object."""
    return {OLD_CONTEXT: config[OLD_CONTEXT]} if config.get(OLD_CONTEXT) is not None else {}


def _one_of(scaling: Config, parameters: Config | None) -> Config:
    """The rope's object, present or old. ValueError if both are there and do not say the same: of two ropes, one would
    have to be left out."""
    if not parameters:
        return scaling
    for key, value in scaling.items():
        other = parameters.get(key, parameters.get(ALSO_NAMED.get(key, key)))
        if value not in (None, other):
            raise ValueError(
                f"config keys 'rope_scaling' and 'rope_parameters' describe two ropes: expected one of them, or the "
                f"same {key!r} in both, got {value!r} and {other!r}"
            )
    return parameters


def _rope_object(config: Config, key: str) -> Config:
    """The object under a key of a config; empty where the key is absent."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config key {key!r}: expected an object, got {value!r}")
    return value or {}


def _first(key: str, default: float, *places: Config) -> float:
    """The positive number under `key` in the first of the places that has the key, else the default."""
    return _rope_number({key: next((p[key] for p in places if p.get(key) is not None), default)}, key)


def _rope_number(given: Config, key: str) -> float:
    value = given.get(key)
    if key == "truncate":
        return flag(given, key, True)
    low = 2 if key == OLD_CONTEXT else LEAST
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= MOST:
        raise ValueError(
            f"rope parameter {key!r}: expected a positive number, got {value!r}; allowed is {low:g} to {MOST:g}"
        )
    return value if key == OLD_CONTEXT else float(value)


def _rope_numbers(given: Config, key: str, count: int) -> tuple[float, ...]:
    """The list of positive numbers under a key."""
    values = given.get(key)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"rope parameter {key!r}: expected a list of {count} numbers, got {values!r:.80}")
    return tuple(_rope_number({key: value}, key) for value in values)


def _longrope(config: Config, factors: Mapping[str, tuple[float, ...]], numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers with the factors that all positions have: the long ones if the model's context is longer than that of
    its first training, however long the texts are. (transformers decides by the text, and for each step anew;
    `with_rope` takes the short ones, and no longer context.)"""
    context = need(config, "max_position_embeddings")
    name = "long_factor" if context > numbers[OLD_CONTEXT] else "short_factor"
    return {"factor": context / numbers[OLD_CONTEXT], **numbers, "factors": factors[name]}


def _with_old_context(config: Config, rope_type: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Scaling parameters with the context length of the first training; the outer config's value wins."""
    if rope_type in ("llama3", "yarn", "longrope"):
        numbers[OLD_CONTEXT] = _first(OLD_CONTEXT, need(config, "max_position_embeddings"), config, numbers)
    return numbers
