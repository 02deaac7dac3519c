"""A checkpoint's config.json as the numbers that a model's program needs; what is not supported is refused by name."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from lockstep.ops.rope import RopeScaling

Config = Mapping[str, Any]  # of a config.json
# words in the name of a config key that suggest that it changes what is computed
MATHS = """scal softcap bias norm rope rotary window expert moe multiplier factor act clip attention attn residual logit
sink kv head layer mlp router quant position linear temperature_tuning mtp embedd""".split()

# keys that every family reads; what else a family reads is listed in `families`
READ = frozenset(
    """model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings max_position_embeddings
original_max_position_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor eos_token_id""".split()
)
# keys that do not matter to inference on text
NEUTRAL = frozenset(
    """architectures attention_dropout residual_dropout hidden_dropout classifier_dropout embd_pdrop
attn_pdrop resid_pdrop initializer_range use_cache cache_implementation output_router_logits router_aux_loss_coef
router_jitter_noise pretraining_tp mamba_ssm_dtype num_labels _attn_implementation attn_implementation
output_attentions output_hidden_states chunk_size_feed_forward vision_config image_token_id video_token_id
vision_start_token_id vision_end_token_id tie_encoder_decoder _attn_implementation_autoset _flash_attn_2_enabled
use_flash_attn text_config""".split()
)
ALLOWED_VALUES = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attn_output_gate": (True,),
    "partial_rotary_factor": (1,),
    "mtp_use_dedicated_embeddings": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}


@dataclass(frozen=True)
class LinearAttention:
    """Shape of a gated delta rule layer."""

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int

    @property
    def qk_width(self) -> int:
        return 2 * self.num_k_heads * self.k_head_dim

    @property
    def v_width(self) -> int:
        return self.num_v_heads * self.v_head_dim

    @property
    def conv_channels(self) -> int:
        return self.qk_width + self.v_width


@dataclass(frozen=True)
class Experts:
    """Shape of a mixture of experts."""

    num_experts: int
    num_per_token: int
    width: int
    renormalise: bool


@dataclass(frozen=True)
class Layer:
    """One decoder layer: what mixes tokens ("attention" or "linear_attention") and how."""

    mixer: str
    rope: bool = True
    window: int = 0  # keys that a token sees, itself included; 0: all
    dense: bool = False  # an MLP where the model's other layers have experts


@dataclass(frozen=True)
class ModelConfig:
    """Everything a decoder's program depends on. Sizes in elements; norm_offset is 1 where checkpoints store w - 1."""

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_positions: int
    layers: tuple[Layer, ...]
    rope_dim: int
    rope_theta: float
    rope_scaling: RopeScaling
    tied: bool
    eos_ids: tuple[int, ...]
    norm_offset: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    output_gate: bool = False
    linear_attention: LinearAttention | None = None
    experts: Experts | None = None
    num_mtp_layers: int = 0
    headless: bool = False  # of a class that ends with the final norm, as embedding models are

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def need(config: Config, key: str, low: int = 1, high: int = 1 << 31) -> int:
    """A required integer of a config, within bounds."""
    return int(_within(config, key, int, low, high))


def need_float(config: Config, key: str, low: float, high: float) -> float:
    """A required number of a config, within bounds."""
    return float(_within(config, key, (int, float), low, high))


def _within(config: Config, key: str, kinds: type | tuple[type, ...], low: float, high: float) -> Any:
    value: Any = config.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"config key {key!r}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"config key {key!r}: expected {low} to {high}, got {value}")
    return value


def optional(config: Config, key: str, default: int, low: int = 1) -> int:
    """A number of a config that may be absent."""
    return default if config.get(key) is None else need(config, key, low=low)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A switch of a config that may be absent."""
    value: Any = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config key {key!r}: expected true or false, got {value!r}")
    return default if value is None else value


def end_ids(config: Config, where: str = "config") -> tuple[int, ...]:
    """The ids in eos_token_id: one, several or none. Some files name ids that no token has."""
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{where} key 'eos_token_id': expected token ids, got {eos!r}")
    return tuple(ids)


def is_headless(config: Config) -> bool:
    """Whether the class that a config names has no head: Qwen3Model, not Qwen3ForCausalLM."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) and n.endswith("Model") for n in names)


def layer_types(config: Config, *kinds: str) -> list[str] | None:
    """What a config says each layer is, one of `kinds`; None where it is silent."""
    types, num_layers = config.get("layer_types"), need(config, "num_hidden_layers", high=1000)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or any(t not in kinds for t in types):
        raise ValueError(f"config key 'layer_types': expected {num_layers} of {' and '.join(kinds)}, got {types!r}")
    return types


def check_keys(config: Config, read: Iterable[str] = (), free: Iterable[str] = ()) -> None:
    """Refuses a key that seems to change the maths and is not supported, and a value that is not.

    read: keys that the family reads besides READ. free: keys whose values the family checks itself.
    """
    for key, value in config.items():
        allowed = ALLOWED_VALUES.get(key) if key not in free else None
        if allowed and value is not None and value not in allowed:
            values = " or ".join(repr(v) for v in allowed)
            raise ValueError(f"config key {key!r}: {value!r} is not supported, only {values}")
        if allowed or key in READ or key in read or key in NEUTRAL or value in (None, False, [], {}):
            continue
        if any(word in key.lower() for word in MATHS):
            raise ValueError(f"config key {key!r} (value {value!r}) is not supported, and it may change the result")


def text_config(config: Config) -> Config:
    """The part of a config that describes the text model, with what is only said outside it."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    check_keys(config)
    keys = ("tie_word_embeddings", "eos_token_id", "architectures")
    outside = {k: config[k] for k in keys if config.get(k) is not None}
    return {**outside, **inner, **{k: v for k, v in outside.items() if k == "tie_word_embeddings"}}


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
) -> dict[str, Any]:
    """rope_dim, rope_theta and rope_scaling: of rope_parameters (transformers 5), or rope_theta, rope_scaling (before).

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
    return dict(rope_dim=_rope_dim(head_dim, share), rope_theta=rope_theta, rope_scaling=scaling)


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


def common(config: Config, rope_defaults: Config | None = None, tied: bool = False, **family: Any) -> ModelConfig:
    """The ModelConfig of a Llama-like config, all layers attention over all keys; `family` sets what differs.

    rope_defaults: see `rope`. tied: whether the head is the embedding where the config is silent.
    """
    num_layers, num_heads = need(config, "num_hidden_layers", high=1000), need(config, "num_attention_heads")
    vocab_size = need(config, "vocab_size")
    eos_ids = tuple(i for i in end_ids(config) if 0 <= i < vocab_size)
    head_dim = optional(config, "head_dim", need(config, "hidden_size") // num_heads)
    made = ModelConfig(
        model_type=config["model_type"],
        vocab_size=vocab_size,
        hidden_size=need(config, "hidden_size"),
        ffn_width=0 if "experts" in family else need(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=optional(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_eps=need_float(config, "rms_norm_eps", 0, 1),
        max_positions=need(config, "max_position_embeddings"),
        layers=(Layer("attention"),) * num_layers,
        **rope(config, head_dim, **(rope_defaults or {})),
        tied=flag(config, "tie_word_embeddings", tied),
        eos_ids=eos_ids,
        headless=is_headless(config),
    )
    return checked(replace(made, **family))


def with_windows(made: ModelConfig, config: Config, types: Sequence[str]) -> ModelConfig:
    """A ModelConfig whose layers of type "sliding_attention" see so many keys as sliding_window says."""
    sizes = [need(config, "sliding_window") if t == "sliding_attention" else 0 for t in types]
    return with_each(made, "window", sizes)


def with_each(made: ModelConfig, name: str, values: Sequence[Any]) -> ModelConfig:
    """A ModelConfig whose layers have these values, one for each, in the field `name`."""
    layers = (replace(layer, **{name: value}) for layer, value in zip(made.layers, values, strict=True))
    return replace(made, layers=tuple(layers))


def checked(config: ModelConfig) -> ModelConfig:
    """Refuses shapes that the kernels cannot run."""
    multiples = {"hidden_size": 32, "head_dim": 16, "ffn_width": 16}
    for name, step in multiples.items():
        if getattr(config, name) % step:
            raise ValueError(f"{name} {getattr(config, name)} is not supported: it must be a multiple of {step}")
    if config.experts and config.experts.width % 16:
        raise ValueError(f"experts of width {config.experts.width} are not supported: it must be a multiple of 16")
    if config.head_dim > 256 or config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"head_dim {config.head_dim} (at most 256) with {config.num_heads} heads and "
            f"{config.num_kv_heads} kv heads (a divisor of the heads) is not supported"
        )
    return config
