"""The part of config.json that says how heads turn with their position."""

from collections.abc import Mapping, Set
from typing import Any

from lockstep.models.config import Config, need
from lockstep.models.model_config import Rope
from lockstep.ops.attention.rope import RopeScaling

OLD_CONTEXT = "original_max_position_embeddings"
YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_KEYS = {  # by rope type: parameters that must be there, and that may be
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (OLD_CONTEXT,)),
    "yarn": (("factor",), (OLD_CONTEXT, *YARN)),
}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
MROPE = {"mrope_section", "mrope_interleaved"}  # for text all three position components are equal


def rope(
    config: Config,
    head_dim: int,
    theta: float = 10000.0,
    partial: float | None = None,
    ignored: Set[str] = frozenset(),
) -> Rope:
    """The rope that a config describes: in rope_parameters (transformers 5), or rope_theta and rope_scaling (before).

    theta, partial: what the family takes where the config is silent; partial None: the family turns all channels.
    ignored: parameters that do not matter to text.
    """
    given = {**_rope_object(config, "rope_scaling"), **_rope_object(config, "rope_parameters")}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = "default" if kind == "mrope" and ignored else kind
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    required, allowed = ROPE_KEYS[kind]
    unknown = {k for k, v in given.items() if v is not None} - ROPE_COMMON - ignored - set(required) - set(allowed)
    if unknown:
        raise ValueError(f"rope parameter {sorted(unknown)[0]!r} is not supported with rope type {kind!r}")
    numbers: dict[str, Any] = {
        k: _rope_number(given, k) for k in (*required, *allowed) if k in required or given.get(k) is not None
    }
    rope_theta = _first("rope_theta", theta, given, config)
    if kind == "yarn" and rope_theta <= 1:
        raise ValueError(f"rope parameter 'rope_theta': expected more than 1 with rope type 'yarn', got {rope_theta}")
    share = _first("partial_rotary_factor", partial or 1.0, given, config)
    if partial is None and share != 1:
        raise ValueError(f"rope parameter 'partial_rotary_factor': {share} is not supported, only 1")
    scaling = RopeScaling(kind=kind, **_old_context(config, kind, numbers))
    return Rope(_rope_dim(head_dim, share), rope_theta, scaling)


def ropes_by_type(config: Config, head_dim: int, thetas: Mapping[str, float]) -> dict[str, Rope]:
    """The rope of each layer type: of rope_parameters, an object for each type (transformers 5); before, rope_theta and
    rope_scaling are of layers that see all keys, rope_local_base_freq is of those with a window.

    thetas: by layer type, of "full_attention" and "sliding_attention", where the config is silent.
    """
    given, found = _rope_object(config, "rope_parameters"), {}
    wrong = next((kind for kind, its in given.items() if kind not in thetas or not isinstance(its, dict)), None)
    if wrong is not None:
        raise ValueError(
            f"config key 'rope_parameters': expected an object for each of {', '.join(thetas)}, got {wrong!r}"
        )
    old = {
        "full_attention": {k: config.get(k) for k in ("rope_theta", "rope_scaling")},
        "sliding_attention": {"rope_theta": config.get("rope_local_base_freq")},
    }
    for kind, theta in thetas.items():
        part = {OLD_CONTEXT: config.get(OLD_CONTEXT), "max_position_embeddings": config["max_position_embeddings"]}
        found[kind] = rope({**part, **old[kind], "rope_parameters": given.get(kind)}, head_dim, theta)
    return found


def _rope_dim(head_dim: int, share: float) -> int:
    """How many of a head's channels turn."""
    rope_dim = int(head_dim * share)
    if rope_dim % 2 or not 0 < rope_dim <= head_dim:
        raise ValueError(
            f"config key 'partial_rotary_factor': {share} of {head_dim} channels is not supported: it must "
            f"be an even number up to {head_dim}"
        )
    return rope_dim


def _rope_object(config: Config, key: str) -> Config:
    """The parameters under a key; none where the config is silent."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config key {key!r}: expected an object, got {value!r}")
    return value or {}


def _first(key: str, default: float, *places: Config) -> float:
    """A positive number from the first place that has it."""
    return _rope_number({key: next((p[key] for p in places if p.get(key) is not None), default)}, key)


def _rope_number(given: Config, key: str) -> float:
    value = given.get(key)
    if key == "truncate" and isinstance(value, bool):
        return value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ValueError(f"rope parameter {key!r}: expected a positive number, got {value!r}")
    return value if key == OLD_CONTEXT else float(value)


def _old_context(config: Config, kind: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Scaling parameters with the context that the model was first trained on; said outside, it wins."""
    if kind in ("llama3", "yarn"):
        numbers[OLD_CONTEXT] = _first(OLD_CONTEXT, need(config, "max_position_embeddings"), config, numbers)
    return numbers
