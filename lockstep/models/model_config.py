"""`ModelConfig`: a model in numbers, which its family reads from config.json (with `config.py`).

A layer has a token mixer (attention heads, or the gated delta rule), followed by an MLP or experts. The layers of one
model may differ in anything: head sizes, kv heads, ropes, windows, widths.
"""

from dataclasses import dataclass

from lockstep.ops.attention.formulas import MAX_HEAD_DIM
from lockstep.ops.attention.rope import Growth, RopeScaling

UNSCALED = RopeScaling()


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding. dim: how many channels of a head are rotated, the first ones. short_factors: of
    longrope, those that are for contexts of the first training's length, whichever `scaling` has."""

    dim: int
    theta: float
    scaling: RopeScaling = UNSCALED
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer.

    scale: of the products of queries and keys. rope: None for heads that are not rotated. window: keys that a token
    sees, itself included; 0: all. soft_cap: c of c tanh(score / c); 0: scores are not capped. sinks: each head has a
    score without a value, which joins its softmax. own_values: there is a projection of values; without it they are the
    keys, before norm and rope. norms_values: values are divided by their root mean square. keys_of: the number of the
    layer whose keys and values are read; None: the layer has its own. growth: of rotated queries with their position;
    None: they do not grow.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int = 0
    soft_cap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False
    own_values: bool = True
    norms_values: bool = False
    keys_of: int | None = None
    growth: Growth | None = None


@dataclass(frozen=True)
class LinearAttention:
    """Shape of a gated delta rule layer. has_heads_in_turn: whether the output projection reads the value heads as GGUF
    files have them: the first of every key head, then the second of every key head."""

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int
    has_heads_in_turn: bool = False

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
class Mlp:
    """A gated MLP: down(activation(gate h) * (up h)). activation: one of `ops.gates.GATES`. deviations: gates are
    max(gate - mean - deviations * standard deviation, 0) first; None: they stay as they are."""

    width: int
    activation: str = "silu"
    bias: bool = False
    deviations: float | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, gated MLPs of one width.

    renormalise: a token's expert weights sum to 1. bias: the router and all matrices of the experts have biases.
    shared_width: of one more expert, which all tokens share and which a sigmoid gates, without biases; 0: there is
    none. transposed: matrices of stacked experts are stored [inputs, outputs], unless their shape says otherwise.
    """

    num_experts: int
    num_per_token: int
    width: int
    renormalise: bool
    activation: str = "silu"
    bias: bool = False
    shared_width: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer. experts: beside an MLP. input_width: of an input of its own for each token, from a second
    embedding; 0: none. side_rank: of a low-rank product beside attention; 0: there is none."""

    mixer: Heads | LinearAttention
    mlp: Mlp | Experts
    experts: Experts | None = None
    input_width: int = 0
    side_rank: int = 0

    @property
    def kind(self) -> str:
        """The name of the token mixer, for people."""
        return "attention" if isinstance(self.mixer, Heads) else "linear attention"

    @property
    def window(self) -> int:
        """How many keys a token sees; 0: all."""
        return self.mixer.window if isinstance(self.mixer, Heads) else 0


@dataclass(frozen=True)
class ModelConfig:
    """A model, in the numbers that all families have. Sizes in elements. tied: the head shares the embedding's matrix.

    mtp_layers: of its multi-token-prediction head. headless: the model class ends with the final norm, as in embedding
    models. logit_cap: c of c tanh(logit / c); 0: logits are not capped. residual_multiplier: of what each half of a
    layer adds. logits_scaling: what logits are divided by. input_rows: of the second embedding, see `Layer`; 0: one for
    each token.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    rms_eps: float
    max_positions: int
    layers: tuple[Layer, ...]
    tied: bool
    eos_ids: tuple[int, ...]
    mtp_layers: tuple[Layer, ...] = ()
    headless: bool = False
    logit_cap: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    input_rows: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def checked_head_dim(head_dim: int, name: str = "head_dim") -> int:
    """The head_dim; ValueError for one that the kernels cannot run. name: where it comes from, for the error."""
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} {head_dim} is not supported: it must be a multiple of 16 and at most {MAX_HEAD_DIM}")
    return head_dim


def checked(config: ModelConfig) -> ModelConfig:
    """The config itself; ValueError for shapes that the kernels cannot run."""
    _check_multiple("hidden_size", config.hidden_size, 32)
    for layer in dict.fromkeys((*config.layers, *config.mtp_layers)):
        if isinstance(layer.mixer, Heads):
            _check_heads(layer.mixer)
        if isinstance(layer.mlp, Mlp):
            _check_multiple("ffn_width", layer.mlp.width, 16)
        for experts in (layer.mlp, layer.experts):
            widths = (experts.width, experts.shared_width) if isinstance(experts, Experts) else ()
            if wrong := [width for width in widths if width % 16]:
                raise ValueError(f"experts of width {wrong[0]} are not supported: it must be a multiple of 16")
        _check_multiple("input_width", layer.input_width, 16)
        _check_multiple("laurel_rank", layer.side_rank, 16)
    return config


def _check_multiple(name: str, value: int, step: int) -> None:
    if value % step:
        raise ValueError(f"{name} {value} is not supported: it must be a multiple of {step}")


def _check_heads(heads: Heads) -> None:
    checked_head_dim(heads.head_dim)
    if heads.num_heads % heads.num_kv_heads:
        raise ValueError(
            f"{heads.num_heads} heads with {heads.num_kv_heads} kv heads is not supported: these must be a divisor of "
            f"the heads"
        )
