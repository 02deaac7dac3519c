"""The decoder that all supported model types share: what is computed, in the order in which it is computed.

    x = embed(token)
    each layer:  x += mixer(norm(x));  x += mlp(norm(x))
    logits = head(norm(x)), only for rows that sample
    hidden = norm(x), only for rows that are embedded
"""
from lockstep.models.record import Recorder
from lockstep.runtime.step import EMBEDDED_ROW, SAMPLED_ROW

PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")


def record(config, tensors, weights="auto", kv_dtype="bf16", max_context=4096):
    """The program of a model: (Program, logits tensor [R, V padded]).

    config: ModelConfig. tensors: HF name -> StoredTensor. weights, kv_dtype: see Recorder.
    """
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise ValueError("tensor 'model.embed_tokens.weight' is missing from the checkpoint")
    ops = Recorder(tensors, prefix, weights, kv_dtype, max_context)
    x = ops.embed(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
    for i, layer in enumerate(config.layers):
        x = decoder_layer(ops, x, config, layer, f"{prefix}layers.{i}")
    norm = f"{prefix}norm.weight", config.rms_eps, config.norm_offset
    h = ops.rms_norm(ops.select_rows(x, "sampled", "R", SAMPLED_ROW), *norm)
    ops.result("hidden", ops.rms_norm(ops.select_rows(x, "embedded", "E", EMBEDDED_ROW), *norm, "hidden"))
    logits = head(ops, h, config, prefix)
    ops.check_all_used()
    return ops.program, logits


def decoder_layer(ops, x, config, layer, label):
    """One layer, with its two residual additions."""
    h = ops.rms_norm(x, f"{label}.input_layernorm.weight", config.rms_eps, config.norm_offset)
    if layer.mixer == "attention":
        heads = ops.attention(h, config, layer, f"{label}.self_attn")
        y = ops.linear(heads, [(f"{label}.self_attn.o_proj", config.hidden_size)], bias=config.o_bias)
    else:
        heads = ops.linear_attention(h, config, f"{label}.linear_attn")
        y = ops.linear(heads, [(f"{label}.linear_attn.out_proj", config.hidden_size)])
    x = ops.add(x, y)
    h = ops.rms_norm(x, f"{label}.post_attention_layernorm.weight", config.rms_eps, config.norm_offset)
    return ops.add(x, mlp(ops, h, config, layer, f"{label}.mlp"))


def mlp(ops, h, config, layer, label):
    """SwiGLU: down(silu(gate h) * (up h)); or the experts in its place."""
    if config.experts and not layer.dense:
        return ops.experts(h, config, label)
    both = ops.linear(
        h, [(f"{label}.gate_proj", config.ffn_width), (f"{label}.up_proj", config.ffn_width)], f"{label}.gate_up"
    )
    return ops.linear(ops.silu_mul(both, label), [(f"{label}.down_proj", config.hidden_size)])


def head(ops, x, config, prefix):
    """Logits of the rows that sample. A head of its own wins over a config that says it is the embedding."""
    own = "lm_head.weight"
    name = f"{prefix}embed_tokens.weight" if config.tied and own not in ops.tensors else own
    return ops.product(x, [ops.stored(name, config.vocab_size, config.hidden_size)], "logits")
