"""The multi-token-prediction (MTP) head of Qwen3.5 and its kin: a small model that drafts the token after the next one.

    x = fc [norm(embed(token at t + 1)), norm(hidden state at t)];  x = decoder layer(x)
    hidden = norm(x);  logits = head of the model (hidden): of the token at t + 2

To draft several tokens, its own hidden state takes the place of the model's in the next pair. Its keys and values lie
at the position of the token whose embedding they are computed from.
Source: DeepSeek-V3 technical report 2024, section 2.2; the tensors' names are those of Qwen3.5's checkpoints.
"""

from dataclasses import replace

from lockstep.formats import FORMATS
from lockstep.formats.choice import compute_format
from lockstep.formats.parts.panels import padded_width
from lockstep.models.decoder import own_head
from lockstep.models.families.qwen.qwen3_5 import OFFSET, layer
from lockstep.models.model_config import ModelConfig
from lockstep.models.record import Norm, Recorder
from lockstep.models.recording import text_prefix
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.output_rows import output_rows_only
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.weights.tensor import StoredTensor, TensorMap

# Of a large vocabulary only so many tokens are drafted: the first ones, which in most tokenizers are the most frequent.
FEW_TOKENS = 32768


def has_mtp(config: ModelConfig, tensors: TensorMap) -> bool:
    """Whether a checkpoint has an MTP head that is supported."""
    return len(config.mtp_layers) == 1 and "mtp.fc.weight" in tensors


def check_mtp(config: ModelConfig, tensors: TensorMap) -> None:
    """ValueError for a checkpoint without an MTP head, or with an MTP head that is not supported."""
    num_layers = len(config.mtp_layers)
    if num_layers == 0 or "mtp.fc.weight" not in tensors:
        tensor = "a" if "mtp.fc.weight" in tensors else "no"
        raise ValueError(
            f"speculate: mtp needs a checkpoint with an MTP head; this one has {num_layers} MTP layers in "
            f"its config and {tensor} tensor mtp.fc.weight"
        )
    if num_layers > 1:
        raise ValueError(f"speculate: mtp is supported with one MTP layer, this checkpoint has {num_layers}")


class HeadRecorder(Recorder):
    """Records an MTP head, with weights of at most eight bits: enough for a draft, and read in half the time of wider
    formats or less."""

    def format_of(self, part: StoredTensor, width: int) -> str:
        """The format that the model's layers would have, or q8_0 in place of a wider one, where the width allows it."""
        format = super().format_of(part, width)
        return format if FORMATS[format].is_quantized else compute_format(part.format, "q8_0", width)

    def first_products(self, x: Tensor, part: StoredTensor, num_features: int, label: str) -> Tensor:
        """x times the first `num_features` rows of a stored tensor. A layer with the whole tensor shares its memory, if
        the layer multiplies in the same format."""
        x, part = self.sorted_columns(x, part)
        format = self.format_of(part, x.width)
        if format == compute_format(part.format, self.weights, x.width):
            weight = Weight(part.name, format, tuple(part.shape), (part,)).first_rows(num_features)
        else:
            first = replace(part, shape=(num_features, *part.shape[1:]), data=part.data[:num_features])
            weight = Weight(f"{part.name}.first_{num_features}", format, first.shape, (first,))
        out = self.program.tensor(label, x.rows, padded_width(num_features))
        sizes = dict(in_features=x.width, out_features=num_features, width=out.width, column=0)
        return self.program.emit(Linear(out=out, x=x, weight=weight, **sizes))


def record_mtp(
    config: ModelConfig,
    tensors: TensorMap,
    weights: str,
    kv_dtype: str,
    max_context: int,
    num_tokens: int | None = None,
) -> tuple[Program, Tensor, int]:
    """The program of a checkpoint's MTP head: (Program, logits tensor [R, padded], number of tokens that have a logit).

    Its input "hidden" is [T, D], its result "hidden" [R, D], of the rows that sample. num_tokens: how many tokens of
    the vocabulary have a logit, the first ones; None: see `guessed_tokens`. ValueError, which names the tensor, for a
    missing tensor or a wrong shape.
    """
    check_mtp(config, tensors)
    prefix = text_prefix(tensors)
    ops = HeadRecorder(tensors, prefix, weights, kv_dtype, max_context)
    D, norm = config.hidden_size, Norm(config.rms_eps, OFFSET)
    e = ops.embed(f"{prefix}embed_tokens.weight", config.vocab_size, D)
    e = ops.rms_norm(e, "mtp.pre_fc_norm_embedding.weight", *norm)
    h = ops.rms_norm(ops.program.give("hidden", "T", D), "mtp.pre_fc_norm_hidden.weight", *norm)
    x = ops.linear(ops.concat(e, h, "mtp.pair"), [("mtp.fc", D)])
    x = layer(ops, x, config, config.mtp_layers[0], "mtp.layers.0")
    h = ops.rms_norm(ops.select_rows(x, "sampled", "R"), "mtp.norm.weight", *norm)
    ops.result("hidden", h)
    vocab = guessed_tokens(config.vocab_size) if num_tokens is None else min(num_tokens, config.vocab_size)
    name = own_head(tensors) or f"{prefix}embed_tokens.weight"
    logits = ops.first_products(h, ops.stored(name, config.vocab_size, D), vocab, "logits")
    return output_rows_only(ops.program), logits, vocab


def guessed_tokens(vocab_size: int) -> int:
    """How many tokens of a vocabulary are drafted by default: all, or FEW_TOKENS of a large one, because logits of rare
    tokens cost more than they gain."""
    return vocab_size if vocab_size <= 2 * FEW_TOKENS else FEW_TOKENS
