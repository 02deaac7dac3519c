"""The decoder that all supported model types share: what is computed, in the order in which it is computed.

    x = embed(token)
    each layer:  x += mixer(norm(x));  x += mlp(norm(x))
    logits = head(norm(x)), only for rows that sample
    hidden = norm(x), only for rows that are embedded

After the last mixer no row is read by another, so only rows with an output (sampled or embedded) go on from there: a
prompt has one, and nearly the whole last layer of its other tokens is not computed.
"""

from lockstep.models.config import Layer, ModelConfig
from lockstep.models.record import Recorder
from lockstep.runtime.program import Program, Tensor
from lockstep.weights.tensor import TensorMap

HEAD = "lm_head.weight"
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")


def record(
    config: ModelConfig, tensors: TensorMap, weights: str = "auto", kv_dtype: str = "bf16", max_context: int = 4096
) -> tuple[Program, Tensor]:
    """The program of a model: (Program, logits tensor [R, V padded]).

    config: ModelConfig. tensors: HF name -> StoredTensor. weights, kv_dtype: see Recorder.
    """
    ops = Recorder(tensors, text_prefix(tensors), weights, kv_dtype, max_context)
    logits = record_on(ops, config)
    ops.check_all_used()
    return ops.program, logits


def text_prefix(tensors: TensorMap) -> str:
    """What the names of the text model's tensors begin with."""
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise ValueError("tensor 'model.embed_tokens.weight' is missing from the checkpoint")
    return prefix


def record_on(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records a model on a Recorder; returns its logits [R, V padded]."""
    prefix = ops.prefix
    x = ops.embed(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
    for i, layer in enumerate(config.layers):
        x = decoder_layer(ops, x, config, layer, f"{prefix}layers.{i}", is_last=i == len(config.layers) - 1)
    norm = f"{prefix}norm.weight", config.rms_eps, config.norm_offset
    h = ops.rms_norm(ops.select_rows(x, "sampled", "R"), *norm)
    ops.result("hidden", ops.rms_norm(ops.select_rows(x, "embedded", "E"), *norm, "hidden"))
    return head(ops, h, config, prefix)


def decoder_layer(ops: Recorder, x: Tensor, config: ModelConfig, layer: Layer, label: str, is_last: bool) -> Tensor:
    """One layer, with its two residual additions. is_last: its mixer's rows without an output are dropped."""
    h = ops.rms_norm(x, f"{label}.input_layernorm.weight", config.rms_eps, config.norm_offset)
    is_attention = layer.mixer == "attention"
    if is_attention:
        heads, out = ops.attention(h, config, layer, f"{label}.self_attn"), f"{label}.self_attn.o_proj"
    else:
        heads, out = ops.linear_attention(h, config, f"{label}.linear_attn"), f"{label}.linear_attn.out_proj"
    if is_last:
        heads = ops.select_rows(heads, f"{label}.heads.output", "O")
        x = ops.select_rows(x, f"{label}.residual.output", "O")
    x = ops.add(x, ops.linear(heads, [(out, config.hidden_size)], bias=is_attention and config.o_bias))
    h = ops.rms_norm(x, f"{label}.post_attention_layernorm.weight", config.rms_eps, config.norm_offset)
    return ops.add(x, mlp(ops, h, config, layer, f"{label}.mlp"))


def mlp(ops: Recorder, h: Tensor, config: ModelConfig, layer: Layer, label: str) -> Tensor:
    """SwiGLU: down(silu(gate h) * (up h)), each with its bias if mlp_bias; or the experts in its place."""
    if config.experts and not layer.dense:
        return ops.experts(h, config, label)
    names, bias = [(f"{label}.{p}_proj", config.ffn_width) for p in ("gate", "up")], config.mlp_bias
    both = ops.linear(h, names, f"{label}.gate_up", bias)
    return ops.linear(ops.silu_mul(both, label), [(f"{label}.down_proj", config.hidden_size)], bias=bias)


def head(ops: Recorder, x: Tensor, config: ModelConfig, prefix: str) -> Tensor:
    """Logits of the rows that sample. A head of its own wins over a config that says it is the embedding.

    Where there is none at all, see `can_generate`, the embedding stands in for it: a program always has one.
    """
    has_own = HEAD in ops.tensors or not (config.tied or config.headless)
    name = HEAD if has_own else f"{prefix}embed_tokens.weight"
    return ops.product(x, [ops.stored(name, config.vocab_size, config.hidden_size)], "logits")


def can_generate(config: ModelConfig, tensors: TensorMap) -> bool:
    """Whether a checkpoint has a head, its own or its embedding; otherwise it is only good for embeddings."""
    return config.tied or not config.headless or HEAD in tensors
