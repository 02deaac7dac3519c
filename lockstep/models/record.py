"""`Recorder`: the methods with which a family records its layers; each call appends an op to a program.

`recording.py` records a whole model with it. Checkpoint tensors are named by their Hugging Face names, and their shapes
are checked here, once. Nothing here depends on the family: differences between models are arguments.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.choice import compute_format
from lockstep.formats.parts.panels import padded_width
from lockstep.models.model_config import Heads, Mlp, Rope
from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import ELEMENTS, AttentionInputs, AttentionQueries, page_shapes
from lockstep.ops.attention.rope import Growth, RopeTables
from lockstep.ops.elementwise.add import Add, AddScaled
from lockstep.ops.elementwise.add_bias import AddBias
from lockstep.ops.elementwise.concat import Concat
from lockstep.ops.elementwise.embed import Embed, MappedEmbed
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.elementwise.select_columns import SelectColumns
from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.sparse_gate import SparseGate
from lockstep.ops.sampling.soft_cap import SoftCap
from lockstep.runtime.program import CacheArray, Program, Table, Tensor, Weight
from lockstep.weights.rearranged import ScatteredColumns
from lockstep.weights.tensor import StoredTensor, is_idle

# Tensors of a checkpoint that the text model does not read: draft heads, towers of images and sound.
PARTS_NOT_TEXT = (
    "mtp", "visual", "vision_tower", "vision_model", "vision_embedder", "connector", "embed_vision",
    "multi_modal_projector", "audio_tower", "embed_audio",
)  # fmt: skip
NOT_TEXT = tuple(f"{prefix}{part}." for prefix in ("", "model.") for part in PARTS_NOT_TEXT)

LAYER_NUMBER = re.compile(r"(?<=\blayers\.)\d+")
NO_ROPE = Rope(2, 1.0)  # placeholder tables for heads that are not rotated, which never read them


class Norm(NamedTuple):
    """Parameters of a norm. offset: added to the weight; 1 where checkpoints store w - 1."""

    eps: float
    offset: float = 0.0


class Recorder:
    """Records a model's program.

    tensors: by Hugging Face name. prefix: of the text model's tensor names. weights: format of the linear layers (see
    `formats.choice`). kv_dtype: type of the KV cache, one of KV_DTYPES.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], prefix: str, weights: str, kv_dtype: str, max_context: int
    ) -> None:
        self.program, self.tensors, self.prefix = Program(), tensors, prefix
        self.weights, self.kv_dtype, self.max_context = weights, kv_dtype, max_context
        self._constants: dict[Any, Any] = {}
        self._used: set[str] = set()
        self._num_ropes = 0

    # ------------------------------------------------------------ tensors of the checkpoint

    def stored(self, name: str, *shape: int) -> StoredTensor:
        """A tensor of the checkpoint, which must have this shape."""
        if name not in self.tensors:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} is missing from the checkpoint")
        self._used.add(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r}: expected shape {list(shape)}, found {list(tensor.shape)}")
        return tensor

    def ignore(self, *names: str) -> None:
        """Takes tensors of the checkpoint as used: those that some conversions keep, and no model reads."""
        self._used.update(names)

    def check_all_used(self) -> None:
        """ValueError for a checkpoint with tensors that no op reads: its config describes another model."""
        unread = [name for name in self.tensors if name not in self._used and not name.startswith(NOT_TEXT)]
        unused = [name for name in unread if "rotary_emb" not in name and not is_idle(name, self.tensors[name])]
        if unused:
            raise ValueError(
                f"tensor {unused[0]!r} (and {len(unused) - 1} more) is not used by a model as its config "
                f"describes it; the result would differ"
            )

    def scaled_constant(self, name: str, factor: float, *shape: int) -> Weight:
        """A small tensor times a number, rounded to float32 once."""

        def make() -> Weight:
            stored = self.stored(name, *shape)
            data = (stored.finite_f32().astype(np.float64) * factor).astype(np.float32)
            return Weight(f"{name}.scaled", "f32", shape, (StoredTensor(f"{name}.scaled", "f32", shape, data),))

        return self._once((name, factor), make)

    def constant(self, name: str, *shape: int) -> Weight:
        """A small tensor (norm weight, bias) as float32."""
        stored = self.stored(name, *shape)
        return self._once(name, lambda: Weight(name, "f32", (shape[-1],) if len(shape) == 1 else shape, (stored,)))

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._constants:
            self._constants[name] = make()
        return self._constants[name]

    # ------------------------------------------------------------ ops

    def embed(self, name: str, vocab_size: int, width: int, scale: float = 1.0) -> Tensor:
        """Rows of an embedding matrix, times scale."""
        return self._embedded(Embed, name, "embed", vocab_size, width, scale=scale)

    def embed_from_file(self, name: str, num_rows: int, width: int, scale: float, label: str) -> Tensor:
        """The same for a matrix so large that it stays in its file. Tokens beyond its rows have row 0."""
        return self._embedded(MappedEmbed, name, label, num_rows, width, scale=scale, num_rows=num_rows)

    def _embedded(self, declaration: type[Embed], name: str, label: str, rows: int, width: int, **sizes: Any) -> Tensor:
        table = self.stored(name, rows, width)
        if table.format not in FORMATS:
            raise ValueError(f"tensor {name!r}: format {table.format} is not supported, only {', '.join(FORMATS)}")
        out = self.program.tensor(label, "T", width)
        weight = Weight(name, table.format, table.shape, (table,))
        return self.program.emit(declaration(out=out, table=weight, width=width, **sizes))

    def rms_norm(
        self, x: Tensor, name: str, eps: float, offset: float = 0.0, label: str | None = None, factor: float = 1.0
    ) -> Tensor:
        """x / rms(x) * (weight + offset), row by row. factor: of the weight, if it has no offset."""
        assert factor == 1 or offset == 0, name
        weight = self.constant(name, x.width) if factor == 1 else self.scaled_constant(name, factor, x.width)
        return self.rms_norm_by(x, weight, label or name.removesuffix(".weight"), eps, offset)

    def rms_norm_by(self, x: Tensor, weight: Weight, label: str, eps: float, offset: float = 0.0) -> Tensor:
        """`rms_norm`, given the weight itself."""
        out = self.program.tensor(label, x.rows, x.width)
        return self.program.emit(RmsNorm(out=out, x=x, weight=weight, width=x.width, eps=eps, offset=offset))

    def linear(
        self, x: Tensor, layers: Sequence[tuple[str, int]], label: str | None = None, bias: bool = False
    ) -> Tensor:
        """x times one or several weights [N, K], outputs side by side. layers: ((Hugging Face name, N), ...).

        Adjacent weights of one format become one product. In the result, output i starts at the sum of the N before.
        """
        parts = [self.stored(f"{name}.weight", n, x.width) for name, n in layers]
        label = label or layers[0][0]
        return self.product(x, parts, label, [f"{name}.bias" for name, _ in layers] if bias else None)

    def product(self, x: Tensor, parts: list[StoredTensor], label: str, biases: list[str] | None = None) -> Tensor:
        """`linear`, given stored tensors."""
        num_features = sum(p.shape[0] for p in parts)
        if len(parts) > 1 and any(p.shape[0] % 16 for p in parts[:-1]):
            raise ValueError(
                f"tensor {parts[0].name!r}: {parts[0].shape[0]} rows; projections that share an input must "
                f"have a multiple of 16"
            )
        out = self.program.tensor(label, x.rows, padded_width(num_features))
        column = 0
        for rows, format, group in self._by_format(x, parts):
            column += self._emit_linear(out, rows, format, group, column)
        return self.add_bias(out, biases, [p.shape[0] for p in parts]) if biases else out

    def format_of(self, part: StoredTensor, width: int) -> str:
        """The format in which a stored tensor is multiplied with rows of `width` elements."""
        return compute_format(part.format, self.weights, width, part.name)

    def _by_format(self, x: Tensor, parts: list[StoredTensor]) -> list[tuple[Tensor, str, list[StoredTensor]]]:
        """Runs of adjacent tensors that the same rows are multiplied with in one format: (rows, format, [tensors]), ...
        in order."""
        pairs = [self.sorted_columns(x, part) for part in parts]
        runs = itertools.groupby(pairs, lambda pair: (pair[0], self.format_of(pair[1], x.width)))
        return [(rows, format, [part for _, part in run]) for (rows, format), run in runs]

    def sorted_columns(self, x: Tensor, part: StoredTensor) -> tuple[Tensor, StoredTensor]:
        """The rows and the tensor of a product: both with sorted columns, if the tensor's format needs them so.
        Products with the same rows and order share the sorted rows."""
        if not isinstance(part, ScatteredColumns) or self.format_of(part.sorted, x.width) != part.sorted.format:
            return x, part
        return self._once((x, part.order.data.tobytes()), lambda: self._select_columns(x, part.order)), part.sorted

    def _select_columns(self, x: Tensor, order: StoredTensor) -> Tensor:
        weight = Weight(order.name, order.format, order.shape, (order,))
        out = self.program.tensor(f"{x.name}.sorted", x.rows, x.width)
        return self.program.emit(SelectColumns(out=out, x=x, order=weight, width=x.width))

    def _emit_linear(self, out: Tensor, x: Tensor, format: str, parts: Sequence[StoredTensor], column: int) -> int:
        """One product of x with concatenated weights of one format; returns how many columns of out it writes."""
        features = sum(p.shape[0] for p in parts)
        weight = Weight("|".join(p.name for p in parts), format, (features, x.width), tuple(parts))
        sizes = dict(in_features=x.width, out_features=features, width=out.width, column=column)
        self.program.emit(Linear(out=out, x=x, weight=weight, **sizes))
        return features

    def concat(self, first: Tensor, second: Tensor, label: str) -> Tensor:
        """Rows of two tensors side by side."""
        out = self.program.tensor(label, first.rows, first.width + second.width)
        widths = dict(first_width=first.width, second_width=second.width)
        return self.program.emit(Concat(out=out, first=first, second=second, **widths))

    def add_bias(self, x: Tensor, names: Sequence[str], widths: Sequence[int]) -> Tensor:
        """x plus biases side by side."""
        parts = tuple(self.stored(name, n) for name, n in zip(names, widths, strict=True))
        weight = Weight("|".join(names), "f32", (1, x.width), parts)
        out = self.program.tensor(f"{x.name}.biased", x.rows, x.width)
        return self.program.emit(AddBias(out=out, x=x, bias=weight, width=x.width))

    def add(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """x + factor * y; the result is named after y."""
        out = self.program.tensor(f"{y.name}.residual", x.rows, x.width)
        return self.program.emit(Add(out=out, x=x, y=y, width=x.width, factor=factor))

    def add_scaled(self, x: Tensor, y: Tensor, factor: str) -> Tensor:
        """(x + y) times a number of the checkpoint, the tensor `factor`; the result is named after y."""
        out = self.program.tensor(f"{y.name}.residual", x.rows, x.width)
        return self.program.emit(AddScaled(out=out, x=x, y=y, factor=self.constant(factor, 1), width=x.width))

    def gated_mlp(self, x: Tensor, mlp: Mlp, label: str, fused: bool = False) -> Tensor:
        """down(activation(gate x) * (up x)), each with a bias if `mlp.bias`.

        fused: the checkpoint has gate and up as one tensor, gate_up_proj, the rows of gate first.
        """
        names = [(f"{label}.{p}_proj", mlp.width) for p in ("gate", "up")]
        names = [(f"{label}.gate_up_proj", 2 * mlp.width)] if fused else names
        both = self.linear(x, names, f"{label}.gate_up", mlp.bias)
        h = self._gated(both, mlp, label)
        return self.linear(h, [(f"{label}.down_proj", x.width)], bias=mlp.bias)

    def _gated(self, x: Tensor, mlp: Mlp, label: str) -> Tensor:
        if mlp.deviations is None:
            return self.gated_mul(x, label, mlp.activation)
        assert mlp.activation == "gelu_tanh", label
        out = self.program.tensor(f"{label}.act", x.rows, mlp.width)
        return self.program.emit(SparseGate(out=out, x=x, width=mlp.width, deviations=mlp.deviations))

    def gated_mul(self, x: Tensor, label: str, activation: str) -> Tensor:
        """activation(first half of the row) * second half."""
        out = self.program.tensor(f"{label}.act", x.rows, x.width // 2)
        return self.program.emit(GatedMul(out=out, x=x, width=out.width, activation=activation))

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        """cap * tanh(logits / cap)."""
        out = self.program.tensor(f"{logits.name}.capped", logits.rows, logits.width)
        return self.program.emit(SoftCap(out=out, logits=logits, width=logits.width, cap=cap))

    def select_rows(self, x: Tensor, label: str, rows: str) -> Tensor:
        """The rows of x that have an output ("O"), that sample ("R") or that are embedded ("E")."""
        out = self.program.tensor(label, rows, x.width)
        return self.program.emit(SelectRows(out=out, x=x, width=x.width, selected=selected_rows(rows)))

    def result(self, name: str, x: Tensor) -> None:
        """Makes a tensor readable after a step, under `name`."""
        self.program.results[name] = x

    # ------------------------------------------------------------ attention

    def rope_tables(self, rope: Rope, growth: Growth | None = None) -> list[Table]:
        """cos and sin of all positions up to max_context. growth: of the queries that they are for."""
        return self._once((rope, growth), lambda: self._make_rope_tables(rope, growth))

    def _make_rope_tables(self, rope: Rope, growth: Growth | None) -> list[Table]:
        tables = RopeTables(self.max_context, rope.dim, rope.theta, rope.scaling, growth)
        tables.cover(1)  # compiles its kernel now, not in the first step
        self._num_ropes += 1
        name = "rope" if self._num_ropes == 1 else f"rope{self._num_ropes}"
        return [Table(f"{name}.cos", tables.cos_PR, tables), Table(f"{name}.sin", tables.sin_PR, tables)]

    def attention(
        self,
        x: Tensor,
        heads: Heads,
        label: str,
        head_norms: Norm | None = None,
        gated: bool = False,
        fused: bool = False,
        whole_norms: bool = False,
    ) -> Tensor:
        """Grouped causal attention over the pages, from hidden rows x to the (gated) heads side by side [T, H K].

        head_norms: the norm of each query and key head, or, if whole_norms, of all heads at once. gated: in the
        projection a gate follows each query head, and the head's output is multiplied by the sigmoid of its gate.
        fused: the checkpoint has the three projections as one tensor, qkv_proj, the rows of queries first, then those
        of keys.
        """
        H, G, K = heads.num_heads, heads.num_kv_heads, heads.head_dim
        q_stride = 2 * K if gated else K
        parts = [("q", H * q_stride)] + [(p, G * K) for p in ("kv" if heads.own_values else "k")]
        parts = parts if heads.keys_of is None else parts[:1]
        names = [(f"{label}.{p}_proj", n) for p, n in parts]
        names = [(f"{label}.qkv_proj", sum(n for _, n in names))] if fused else names
        qkv = self.linear(x, names, f"{label}.qkv", heads.qkv_bias)
        k_pages, v_pages = self._pages(heads, label)
        kv = dict(k_pages=k_pages, v_pages=v_pages, page_group=k_pages.group, num_kv_heads=G)
        cos, sin = self.rope_tables(heads.rope or NO_ROPE)
        q_tables = self.rope_tables(heads.rope, heads.growth) if heads.rope and heads.growth else (None, None)
        norm = head_norms or Norm(0.0)
        queries = dict(
            q=self.program.tensor(f"{label}.q", "T", H * K),
            x=qkv,
            cos=cos,
            sin=sin,
            q_norm=self.constant(f"{label}.q_norm.weight", H * K if whole_norms else K) if head_norms else None,
            num_heads=H,
            head_dim=K,
            rope_dim=heads.rope.dim if heads.rope else 0,
            row_width=qkv.width,
            eps=norm.eps,
            norm_offset=norm.offset,
        )
        if heads.keys_of is not None:
            assert not (gated or whole_norms or heads.growth), label
            q = self.program.emit(AttentionQueries(**queries))
        else:
            q = self.program.emit(
                AttentionInputs(
                    k_norm=self.constant(f"{label}.k_norm.weight", G * K if whole_norms else K) if head_norms else None,
                    q_cos=q_tables[0],
                    q_sin=q_tables[1],
                    q_offset=0,
                    q_stride=q_stride,
                    k_offset=H * q_stride,
                    v_offset=H * q_stride + G * K * heads.own_values,
                    norms_values=heads.norms_values,
                    whole_norms=whole_norms,
                    bf16=self.kv_dtype == "bf16",
                    **queries,
                    **kv,
                )
            )
        gate = dict(gate=qkv, gate_width=qkv.width, gate_offset=K, gate_stride=q_stride) if gated else {}
        return self.program.emit(
            Attention(
                out=self.program.tensor(f"{label}.heads", "T", H * K),
                stats=self.program.tensor(f"{label}.softmax", "T", 2 * H),
                q=q,
                scale=heads.scale,
                window=heads.window,
                soft_cap=heads.soft_cap,
                sinks=self.constant(f"{label}.sinks", H) if heads.sinks else None,
                num_heads=H,
                head_dim=K,
                **kv,
                **gate,
            )
        )

    def _pages(self, heads: Heads, label: str) -> list[CacheArray]:
        """The pages of a layer's keys and of its values: its own, or those of the layer `heads.keys_of`."""
        if heads.keys_of is not None:
            owner = LAYER_NUMBER.sub(str(heads.keys_of), label)
            return [self.program.cache_named(f"{owner}.{p}_pages") for p in "kv"]
        shapes = page_shapes(heads.num_kv_heads, heads.head_dim, self.kv_dtype)
        return [
            self.program.cache(f"{label}.{p}_pages", "pages", ELEMENTS[self.kv_dtype], shape, heads.window)
            for p, shape in zip("kv", shapes, strict=True)
        ]

    # ------------------------------------------------------------ projections side by side

    def projected(self, x: Tensor, parts: list[StoredTensor], label: str) -> Tensor:
        """x times several weights, outputs side by side, each starting at a multiple of 16 columns."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + padded_width(part.shape[0]))
        out = self.program.tensor(f"{label}.proj", x.rows, offsets[-1])
        start = 0
        for rows, format, group in self._by_format(x, parts):
            for run in _aligned_runs(group):
                self._emit_linear(out, rows, format, run, offsets[start])
                start += len(run)
        return out


def _aligned_runs(parts: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    """Splits a list of tensors after each tensor whose number of rows is no multiple of 16."""
    runs: list[list[StoredTensor]] = [[]]
    for part in parts:
        runs[-1].append(part)
        if part.shape[0] % 16:
            runs.append([])
    return [run for run in runs if run]
