"""A loaded model: its config, its program in recorded and in runnable form, and its weights."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.models.decoder import can_generate
from lockstep.models.model_config import ModelConfig
from lockstep.models.mtp import check_mtp, has_mtp, record_mtp
from lockstep.models.recording import record
from lockstep.models.registry import model_config
from lockstep.models.rope_config import with_rope
from lockstep.ops import BACKENDS
from lockstep.ops.attention.kv_cache import KV_DTYPES
from lockstep.ops.attention.rope import MAX_POSITIONS
from lockstep.ops.rewrite import RECORDED_KINDS, fuse, lower
from lockstep.ops.sampling.adjust_logits import AdjustLogits
from lockstep.ops.sampling.sample import MAX_LOGPROBS, Sample, scratch_width
from lockstep.runtime.backend import OpTable, swapped
from lockstep.runtime.operands import GROUPS
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.weights.checkpoint import Checkpoint
from lockstep.weights.store import WeightStore


@dataclass(frozen=True)
class Model:
    """A model ready to be run.

    checkpoint: the files it was loaded from. config: ModelConfig. recorded: the unfused program. logits: the tensor of
    logits in it. store: its packed weights. weights, kv_dtype: formats of the linear layers and of the KV cache.
    max_context: the most positions of a request. plan: the hash of the quantization plan by which it runs, see
    `planned`; "": none. rope: "short" if it runs with factors of its rope that its config does not call for; else "".
    """

    checkpoint: Checkpoint
    config: ModelConfig
    recorded: Program
    logits: Tensor
    store: WeightStore
    weights: str
    kv_dtype: str
    max_context: int
    plan: str = ""
    rope: str = ""

    @functools.cached_property
    def main_formats(self) -> list[str]:
        """The formats of at least a twentieth of the weights each, the one with most weights first."""
        weights = {value for op in self.recorded.ops for value in op.inputs if isinstance(value, Weight)}
        sizes: Counter[str] = Counter()
        for weight in weights:
            sizes[weight.format] += math.prod(weight.shape)
        return [format for format, size in sizes.most_common() if size * 20 >= sizes.total()]

    @functools.cached_property
    def can_generate(self) -> bool:
        """Whether it has an lm_head; without one it only makes embeddings."""
        return can_generate(self.config, self.checkpoint.tensors)

    def drafts_by_mtp(self, speculate: str) -> bool:
        """Whether its MTP head is to draft: with "mtp", and with "auto" if the model has one. ValueError for "mtp" if
        it has none."""
        if speculate == "mtp":
            check_mtp(self.config, self.checkpoint.tensors)
        return speculate == "mtp" or (speculate == "auto" and has_mtp(self.config, self.checkpoint.tensors))

    @functools.cached_property
    def recorded_mtp(self) -> Program:
        """The unfused program of its MTP head, sampling included. ValueError if a part of the head is missing."""
        program, logits, num_tokens = record_mtp(
            self.config, self.checkpoint.tensors, self.weights, self.kv_dtype, self.max_context
        )
        emit_sampling(program, logits, num_tokens)
        return program

    @functools.cached_property
    def program(self) -> Program:
        """The program as the cpu backend runs it: lowered and fused, sampling included."""
        return self.rewritten(BACKENDS["cpu"])

    def rewritten(self, backend: OpTable, fused: bool = True) -> Program:
        """The program lowered for a backend, and fused as far as the backend has fused ops."""
        lowered = lower(self.recorded)
        return fuse(lowered, backend) if fused else lowered

    def backend(self, swaps: Mapping[str, str] | None = None, base: str = "cpu") -> OpTable:
        """The op table, with swaps such as {"linear": "reference"}: {kind or group of ops of the model: backend}.

        A swap of a kind also holds for the op that `verifying` puts in its place.
        """
        if base not in BACKENDS:
            raise ValueError(f"backend {base!r}: there are {', '.join(sorted(BACKENDS))}")
        table = {**BACKENDS["reference"], **BACKENDS[base]}
        return swapped(table, self._swaps_of_kinds(swaps, table) if swaps else {}, BACKENDS)

    def _swaps_of_kinds(self, swaps: Mapping[str, str], table: OpTable) -> dict[str, str]:
        """The overrides {op kind: backend name}, with each name of a group of ops expanded to its op kinds."""
        if not isinstance(swaps, Mapping) or not all(isinstance(word, str) for pair in swaps.items() for word in pair):
            raise ValueError(f"ops: expected a mapping from kinds or groups of ops to backends, got {swaps!r:.80}")
        lowered = lower(self.recorded)
        ops = (*lowered.ops, *fuse(lowered, table).ops)  # of this model, fused and unfused
        kinds, members = {op.kind for op in ops}, {g: {op.kind for op in ops if op.group == g} for g in GROUPS}
        wrong = next((kind for kind in swaps if kind not in kinds and kind not in members), None)
        if wrong is not None:
            raise ValueError(
                f"--op {wrong}={swaps[wrong]}: the model has no op of this kind; it has {', '.join(sorted(kinds))}, in "
                f"the groups {', '.join(GROUPS)}"
            )
        named = {}
        for kind, name in swaps.items():
            known = [k for k in members.get(kind, ()) if k in BACKENDS.get(name, {})]
            named.update({k: name for k in known or [kind]})
        return named | {kind: named[plain] for kind, plain in RECORDED_KINDS.items() if plain in named}


def load_model(
    checkpoint: Checkpoint,
    store: WeightStore,
    weights: str = "auto",
    kv_dtype: str | None = None,
    max_context: int | None = None,
    rope: str = "auto",
) -> Model:
    """Records a checkpoint's program. ValueError for a kv_dtype or max_context that is not allowed.

    weights: a format for the linear layers, or "auto": the format of the file. kv_dtype: "f32", "bf16" or "q8"; None:
    "f32" if weights is "f32", else "bf16". max_context: positions, at most the model's; None: the model's, up to
    MAX_POSITIONS. `cache.size.context_size` says how many of them fit in memory. rope: "auto" or "short", see
    `with_rope`; ValueError for a model without short factors.
    """
    if max_context is not None and not (type(max_context) is int and max_context > 0):
        raise ValueError(f"max_context: expected a positive integer or None, got {max_context!r:.80}")
    usual = model_config(checkpoint.config)
    config = with_rope(usual, rope)
    max_context = min(config.max_positions, max_context or MAX_POSITIONS)
    if kv_dtype not in (None, *KV_DTYPES):
        raise ValueError(f"kv_dtype {kv_dtype!r}: expected one of {', '.join(KV_DTYPES)}")
    kv_dtype = kv_dtype or ("f32" if weights == "f32" else "bf16")
    program, logits = record(config, checkpoint.tensors, weights, kv_dtype, max_context)
    emit_sampling(program, logits, config.vocab_size)
    chosen = "" if config.layers == usual.layers else rope
    return Model(checkpoint, config, program, logits, store, weights, kv_dtype, max_context, rope=chosen)


def emit_sampling(program: Program, logits: Tensor, vocab_size: int) -> None:
    """Ends a program with the choice of a token for each row of logits (which may be wider than the vocabulary)."""
    shared = dict(logits=logits, vocab_size=vocab_size, width=logits.width)
    adjusted = program.emit(AdjustLogits(out=program.tensor("logits.adjusted", "R", logits.width), **shared))
    scratch = program.tensor("sample.scratch", "R", scratch_width(vocab_size))
    sample = Sample(
        token=program.tensor("token", "R", 1, "i32"),
        logprob=program.tensor("logprob", "R", 1),
        top_token=program.tensor("top_token", "R", MAX_LOGPROBS, "i32"),
        top_logprob=program.tensor("top_logprob", "R", MAX_LOGPROBS),
        scratch=scratch,
        adjusted=adjusted,
        scratch_width=scratch.width,
        **shared,
    )
    program.emit(sample)
