"""A decoder around its layers: embedding, final norm and head. Each family records the layers in its own way.

    x = embed(token);  each layer: x = layer(x);  logits = head(norm(x)), capped in some families, of sampled rows

A step also returns hidden states, norm(x), of the rows whose request asks for an embedding.
"""

from collections.abc import Callable, Mapping

from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.record import Recorder
from lockstep.runtime.program import Tensor
from lockstep.weights.tensor import StoredTensor, TensorMap

HEAD = "lm_head.weight"
HEADS = (HEAD, "language_model.lm_head.weight")  # the second in old checkpoints of vision-language models
RecordLayer = Callable[[Recorder, Tensor, ModelConfig, Layer, str], Tensor]


def decoder(
    ops: Recorder, config: ModelConfig, layer: RecordLayer, norm_offset: float = 0.0, embed_scale: float = 1.0
) -> Tensor:
    """Records a model and returns its logits [R, V padded].

    layer: records one layer, called as layer(ops, x, config, Layer, label). norm_offset: of the final norm.
    embed_scale: factor of the embeddings. What logits are divided by divides the weight of the norm before the head,
    which costs nothing, and for a power of two gives the same bits; hidden states stay as they are.
    """
    prefix, eps = ops.prefix, config.rms_eps
    x = ops.embed(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size, embed_scale)
    for i, shape in enumerate(config.layers):
        x = layer(ops, x, config, shape, f"{prefix}layers.{i}")
    return ended(ops, x, config, eps, norm_offset)


def ended(ops: Recorder, x: Tensor, config: ModelConfig, eps: float, norm_offset: float = 0.0) -> Tensor:
    """Logits of the rows that sample, given the output of the last layer; also records hidden states."""
    prefix = ops.prefix
    sampled, factor = ops.select_rows(x, "sampled", "R"), 1 / config.logits_scaling
    h = ops.rms_norm(sampled, f"{prefix}norm.weight", eps, norm_offset, factor=factor)
    hidden = ops.select_rows(x, "embedded", "E")
    ops.result("hidden", ops.rms_norm(hidden, f"{prefix}norm.weight", eps, norm_offset, "hidden"))
    return head(ops, h, config, prefix)


def head(ops: Recorder, x: Tensor, config: ModelConfig, prefix: str) -> Tensor:
    """Logits of the rows that sample, capped if the config has a cap. A head in the checkpoint wins over a config that
    ties it to the embedding.

    A headless model (see `can_generate`) takes the embedding as its head, because every program has one.
    """
    name = own_head(ops.tensors)
    if name is None:
        name = f"{prefix}embed_tokens.weight" if config.tied or config.headless else HEAD
    logits = ops.product(x, [ops.stored(name, config.vocab_size, config.hidden_size)], "logits")
    return ops.soft_cap(logits, config.logit_cap) if config.logit_cap else logits


def own_head(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The name of the checkpoint's head tensor; None if it has none. ValueError for two."""
    heads = [name for name in HEADS if name in tensors]
    if len(heads) > 1:
        raise ValueError(f"tensors {heads[0]!r} and {heads[1]!r} are both the head; expected one of them")
    return heads[0] if heads else None


def can_generate(config: ModelConfig, tensors: TensorMap) -> bool:
    """Whether a checkpoint has a head, stored or tied to the embedding; without one it can only embed texts."""
    return config.tied or not config.headless or own_head(tensors) is not None
