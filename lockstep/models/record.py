"""Recording: the vocabulary in which a model says what it computes. Each call appends an op to a program.

A model names checkpoint tensors by their Hugging Face names; shapes are checked here, once, with a clear error.
"""

import itertools
from dataclasses import replace

from lockstep.formats.panels import padded_width
from lockstep.ops.activations import ROW_FORMATS
from lockstep.ops.add import Add
from lockstep.ops.add_bias import AddBias
from lockstep.ops.attention import Attention
from lockstep.ops.concat import Concat
from lockstep.ops.embed import FORMATS as EMBED_FORMATS
from lockstep.ops.embed import Embed, format_code
from lockstep.ops.experts import FORMATS as EXPERT_FORMATS
from lockstep.ops.experts import ExpertGated, ExpertLinear, ExpertRows, ExpertScatter
from lockstep.ops.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.gated_norm import GatedNorm
from lockstep.ops.kv_cache import ELEMENTS, AttentionInputs, page_shapes
from lockstep.ops.linear import PREPARATION, Linear
from lockstep.ops.moe import CombineExperts, GroupExperts, Route
from lockstep.ops.rms_norm import RmsNorm
from lockstep.ops.rope import RopeTables
from lockstep.ops.select_rows import SelectRows, selected_rows
from lockstep.ops.silu_mul import SiluMul
from lockstep.runtime.program import Program, Table, Weight

LINEAR_FORMATS = tuple(PREPARATION)
INTEGER_FORMATS = tuple(f for f, preparation in PREPARATION.items() if preparation == "quantize_q8")
CHOICES = ("auto", "f32", "bf16", "q8_0", "q4_0")
# tensors that a text model's checkpoint may hold beside its own: draft heads, the part that sees, old rope tables
NOT_TEXT = ("mtp.", "model.visual.", "visual.", "model.vision_tower.", "vision_tower.")


def compute_format(stored, requested, width):
    """The format in which a linear layer multiplies a tensor that is stored in another.

    "auto" keeps what is stored, if there is a kernel for it. Formats that prepare activations take them in blocks of 32
    (and K-quants of 256); another width falls back to a format that can.
    """
    if requested not in CHOICES:
        raise ValueError(f"weights {requested!r}: expected one of {', '.join(CHOICES)}")
    chosen = stored if requested == "auto" else requested
    if chosen not in LINEAR_FORMATS:
        chosen = "q8_0" if chosen.startswith("q") else "f32" if chosen == "f64" else "bf16"
    if chosen not in ("f32", "f16") and width % 32:
        return "f32"
    return "bf16" if chosen.endswith("_k") and width % 256 else chosen


class Recorder:
    """Records a model's program.

    tensors: HF name -> StoredTensor. weights: format of the linear layers (see CHOICES). kv_dtype: one of KV_DTYPES.
    """

    def __init__(self, tensors, prefix, weights, kv_dtype, max_context):
        self.program, self.tensors, self.prefix = Program(), tensors, prefix
        self.weights, self.kv_dtype, self.max_context, self._constants = weights, kv_dtype, max_context, {}
        self._used = set()

    # ------------------------------------------------------------ tensors of the checkpoint

    def stored(self, name, *shape):
        """A tensor of the checkpoint, which must have this shape."""
        if name not in self.tensors:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} is missing from the checkpoint")
        self._used.add(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r}: expected shape {list(shape)}, found {list(tensor.shape)}")
        return tensor

    def check_all_used(self):
        """Refuses a checkpoint with tensors that the program does not read: the model is another than the config
        says."""
        left = [n for n in self.tensors if n not in self._used and not n.startswith(NOT_TEXT) and "rotary_emb" not in n]
        if left:
            raise ValueError(
                f"tensor {left[0]!r} (and {len(left) - 1} more) is not used by a model as its config "
                f"describes it; the result would differ"
            )

    def constant(self, name, *shape):
        """A small tensor (norm weight, bias) as float32."""
        stored = self.stored(name, *shape)
        return self._once(name, lambda: Weight(name, "f32", (shape[-1],) if len(shape) == 1 else shape, (stored,)))

    def _once(self, name, make):
        if name not in self._constants:
            self._constants[name] = make()
        return self._constants[name]

    # ------------------------------------------------------------ ops

    def embed(self, name, vocab_size, width):
        table = self.stored(name, vocab_size, width)
        if table.format not in EMBED_FORMATS:
            raise ValueError(
                f"tensor {name!r}: format {table.format} is not supported, only {', '.join(EMBED_FORMATS)}"
            )
        out = self.program.tensor("embed", "T", width)
        weight = Weight(name, table.format, table.shape, (table,))
        code = format_code(table.format)
        return self.program.emit(Embed(out=out, table=weight, width=width, format=code, scale=1.0))

    def rms_norm(self, x, name, eps, offset, label=None):
        out = self.program.tensor(label or name.removesuffix(".weight"), x.rows, x.width)
        weight = self.constant(name, x.width)
        return self.program.emit(RmsNorm(out=out, x=x, weight=weight, width=x.width, eps=eps, offset=offset))

    def linear(self, x, layers, label=None, bias=False):
        """x times one or several weights [N, K], their outputs side by side. layers: ((HF name, N), ...).

        Neighbours of one format become one product. Returns the row tensor; output i starts at the sum of the N before.
        """
        parts = [self.stored(f"{name}.weight", n, x.width) for name, n in layers]
        label = label or layers[0][0]
        return self.product(x, parts, label, [f"{name}.bias" for name, _ in layers] if bias else None)

    def product(self, x, parts, label, biases=None):
        """`linear` on stored tensors."""
        total = sum(p.shape[0] for p in parts)
        if len(parts) > 1 and any(p.shape[0] % 16 for p in parts[:-1]):
            raise ValueError(
                f"tensor {parts[0].name!r}: {parts[0].shape[0]} rows; projections that share an input must "
                f"have a multiple of 16"
            )
        out = self.program.tensor(label, x.rows, padded_width(total))
        column = 0
        for format, group in self._by_format(parts, x.width):
            column += self._emit_linear(out, x, format, group, column)
        return self.add_bias(out, biases, [p.shape[0] for p in parts]) if biases else out

    def format_of(self, part, width):
        """The format in which a stored tensor is multiplied with rows of a width."""
        return compute_format(part.format, self.weights, width)

    def _by_format(self, parts, width):
        """Neighbours that are multiplied in one format: (format, [tensors]), ... in order."""
        runs = itertools.groupby(parts, lambda part: self.format_of(part, width))
        return [(format, list(run)) for format, run in runs]

    def _emit_linear(self, out, x, format, parts, column):
        """One product of x with weights of a format end to end; returns how many columns of out it makes."""
        features = sum(p.shape[0] for p in parts)
        weight = Weight("|".join(p.name for p in parts), format, (features, x.width), tuple(parts))
        sizes = dict(in_features=x.width, out_features=features, width=out.width, column=column)
        self.program.emit(Linear(out=out, x=x, weight=weight, **sizes))
        return features

    def first_products(self, x, part, count, label):
        """x times the first `count` rows of a stored tensor: in memory that a layer with the whole tensor has, if it is
        multiplied in the same format there."""
        format = self.format_of(part, x.width)
        if format == compute_format(part.format, self.weights, x.width):
            weight = Weight(part.name, format, tuple(part.shape), (part,)).first_rows(count)
        else:
            first = replace(part, shape=(count, *part.shape[1:]), data=part.data[:count])
            weight = Weight(f"{part.name}.first_{count}", format, first.shape, (first,))
        out = self.program.tensor(label, x.rows, padded_width(count))
        sizes = dict(in_features=x.width, out_features=count, width=out.width, column=0)
        return self.program.emit(Linear(out=out, x=x, weight=weight, **sizes))

    def concat(self, first, second, label):
        """Rows of two tensors side by side."""
        out = self.program.tensor(label, first.rows, first.width + second.width)
        widths = dict(first_width=first.width, second_width=second.width)
        return self.program.emit(Concat(out=out, first=first, second=second, **widths))

    def add_bias(self, x, names, widths):
        parts = tuple(self.stored(name, n) for name, n in zip(names, widths, strict=True))
        weight = Weight("|".join(names), "f32", (1, x.width), parts)
        out = self.program.tensor(f"{x.name}.biased", x.rows, x.width)
        return self.program.emit(AddBias(out=out, x=x, bias=weight, width=x.width))

    def add(self, x, y):
        out = self.program.tensor(f"{y.name}.residual", x.rows, x.width)
        return self.program.emit(Add(out=out, x=x, y=y, width=x.width))

    def silu_mul(self, x, label):
        """silu(first half of the row) * second half."""
        out = self.program.tensor(f"{label}.act", x.rows, x.width // 2)
        return self.program.emit(SiluMul(out=out, x=x, width=out.width))

    def experts(self, x, config, label):
        """A mixture of experts: each row through the SwiGLU of its most probable experts, summed by their weights."""
        m, D = config.experts, x.width
        E, X = m.num_experts, m.num_per_token
        tensor, emit = self.program.tensor, self.program.emit
        logits = self.linear(x, [(f"{label}.gate", E)])
        counts = dict(num_experts=E, top_k=X)
        route = Route(
            expert_ids=tensor(f"{label}.expert_ids", x.rows, X, "i32"),
            weights=tensor(f"{label}.weights", x.rows, X),
            logits=logits,
            renormalise=m.renormalise,
            width=logits.width,
            **counts,
        )
        group = GroupExperts(
            order=tensor(f"{label}.order", x.rows, X, "i32"),
            expert_start=tensor(f"{label}.expert_start", x.rows, E + 1, "i32"),
            expert_ids=emit(route),
            **counts,
        )
        order, shape = emit(group), dict(expert_start=group.expert_start, **counts)
        gate_up, down = self._expert_weights(label, m, D)
        made = self._prepared_rows(f"{label}.expert_rows", x.rows, X, gate_up.format, D)
        h = emit(ExpertRows(x=x, order=order, **made))
        made = dict(out=tensor(f"{label}.experts.gate_up", x.rows, X * 2 * m.width), features=2 * m.width)
        h = emit(ExpertLinear(x=h, weight=gate_up, width=D, **made, **shape))
        made = self._prepared_rows(f"{label}.experts.act", x.rows, X, down.format, m.width)
        h = emit(ExpertGated(x=h, **made))
        made = dict(out=tensor(f"{label}.experts.down", x.rows, X * D), features=D)
        h = emit(ExpertLinear(x=h, weight=down, width=m.width, **made, **shape))
        y = tensor(f"{label}.experts", x.rows, X * D)
        y = emit(ExpertScatter(out=y, x=h, order=order, width=D, top_k=X))
        out = tensor(f"{label}.combined", x.rows, D)
        return emit(CombineExperts(out=out, weights=route.weights, y=y, width=D, top_k=X))

    def _prepared_rows(self, label, rows, top_k, format, width):
        """The output and parameters of an op that prepares top_k rows for experts' weights of a format."""
        prepared = ROW_FORMATS[PREPARATION[format]]
        out = self.program.tensor(label, rows, top_k * prepared.width(width), prepared.dtype)
        return dict(out=out, width=width, top_k=top_k, preparation=PREPARATION[format])

    def _expert_weights(self, label, m, D):
        """All experts' gate and up, expert after expert, and all experts' down, as two weights.

        Experts in formats that there is no kernel for become q8_0 when they are packed.
        """

        def joined(names, rows, width):
            each = [f"{label}.experts.{e}.{n}_proj.weight" for e in range(m.num_experts) for n in names]
            parts = tuple(self.stored(name, rows, width) for name in each)
            formats = {compute_format(p.format, self.weights, width) for p in parts}
            format = formats.pop() if len(formats) == 1 and formats <= set(EXPERT_FORMATS) else "q8_0"
            return Weight(f"{label}.experts.{'_'.join(names)}", format, (len(parts) * rows, width), parts)

        return joined(("gate", "up"), m.width, D), joined(("down",), D, m.width)

    def select_rows(self, x, label, rows):
        """Some rows of x: those with an output ("O"), of them those that are sampled ("R") or embedded ("E")."""
        out = self.program.tensor(label, rows, x.width)
        return self.program.emit(SelectRows(out=out, x=x, width=x.width, selected=selected_rows(rows)))

    def result(self, name, x):
        """Makes a tensor readable after a step, under a name."""
        self.program.results[name] = x

    # ------------------------------------------------------------ attention

    def rope_tables(self, config):
        """cos and sin of all positions up to max_context."""
        return self._once("rope", lambda: self._make_rope_tables(config))

    def _make_rope_tables(self, config):
        made = RopeTables(self.max_context, config.rope_dim, config.rope_theta, config.rope_scaling)
        made.cover(1)  # what it runs is compiled now
        return [Table("rope.cos", made.cos_PR, made), Table("rope.sin", made.sin_PR, made)]

    def attention(self, x, config, layer, label):
        """Grouped causal attention over the pages, from hidden rows x to the (gated) heads side by side [T, H K]."""
        H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
        q_stride = 2 * K if config.output_gate else K
        names = [(f"{label}.{p}_proj", n) for p, n in (("q", H * q_stride), ("k", G * K), ("v", G * K))]
        qkv = self.linear(x, names, f"{label}.qkv", config.qkv_bias)
        k_pages, v_pages = (
            self.program.cache(f"{label}.{p}_pages", "pages", ELEMENTS[self.kv_dtype], shape, layer.window)
            for p, shape in zip("kv", page_shapes(G, K, self.kv_dtype), strict=True)
        )
        heads = dict(k_pages=k_pages, v_pages=v_pages, page_group=k_pages.group)
        heads |= dict(num_heads=H, num_kv_heads=G, head_dim=K)
        cos, sin = self.rope_tables(config)
        q = self.program.emit(
            AttentionInputs(
                q=self.program.tensor(f"{label}.q", "T", H * K),
                x=qkv,
                cos=cos,
                sin=sin,
                q_norm=self.constant(f"{label}.q_norm.weight", K) if config.qk_norm else None,
                k_norm=self.constant(f"{label}.k_norm.weight", K) if config.qk_norm else None,
                rope_dim=config.rope_dim if layer.rope else 0,
                row_width=qkv.width,
                q_offset=0,
                q_stride=q_stride,
                k_offset=H * q_stride,
                v_offset=H * q_stride + G * K,
                eps=config.rms_eps,
                norm_offset=config.norm_offset,
                bf16=self.kv_dtype == "bf16",
                **heads,
            )
        )
        gate = dict(gate=qkv, gate_width=qkv.width, gate_offset=K, gate_stride=q_stride) if config.output_gate else {}
        return self.program.emit(
            Attention(
                out=self.program.tensor(f"{label}.heads", "T", H * K),
                stats=self.program.tensor(f"{label}.softmax", "T", 2 * H),
                q=q,
                scale=float(K) ** -0.5,
                window=layer.window,
                soft_cap=0.0,
                **heads,
                **gate,
            )
        )

    # ------------------------------------------------------------ gated delta rule

    def linear_attention(self, x, config, label):
        """The gated delta rule layer, from hidden rows x to the normed and gated heads [T, H V]."""
        m = config.linear_attention
        C, H, V, J = m.conv_channels, m.num_v_heads, m.v_head_dim, m.conv_width
        names = [(f"{label}.in_proj_{p}", n) for p, n in (("qkv", C), ("z", m.v_width), ("b", H), ("a", H))]
        parts = [self.stored(f"{name}.weight", n, x.width) for name, n in names]
        proj = self.projected(x, parts, label)
        state = self.program.cache(f"{label}.state", "state", "f32", (H, V // 16, m.k_head_dim, 16))
        history = self.program.cache(f"{label}.conv_state", "state", "f32", (J - 1, C))
        taps = self.stored(f"{label}.conv1d.weight", C, 1, J)
        z, b = C, padded_width(C + m.v_width)
        heads = dict(num_k_heads=m.num_k_heads, k_head_dim=m.k_head_dim, num_v_heads=H)
        inputs = DeltaInputs(
            out=self.program.tensor(f"{label}.conv", "T", C),
            gates=self.program.tensor(f"{label}.gates", "T", 2 * H),
            x=proj,
            weight=Weight(f"{label}.conv1d.weight", "f32", (C, J), (taps,)),
            a_log=self.constant(f"{label}.A_log", H),
            dt_bias=self.constant(f"{label}.dt_bias", H),
            state=history,
            row_width=proj.width,
            offset=0,
            channels=C,
            conv_width=J,
            a_offset=b + padded_width(H),
            b_offset=b,
            **heads,
        )
        qkv = self.program.emit(inputs)
        rule = GatedDelta(
            out=self.program.tensor(f"{label}.heads", "T", H * V),
            qk=qkv,
            v=qkv,
            gates=inputs.gates,
            state=state,
            qk_width=C,
            v_width=C,
            v_offset=m.qk_width,
            v_head_dim=V,
            **heads,
        )
        out = self.program.tensor(f"{label}.norm", "T", H * V)
        weight = self.constant(f"{label}.norm.weight", V)
        where = dict(row_width=proj.width, z_offset=z, num_heads=H, head_dim=V)
        return self.program.emit(
            GatedNorm(out=out, o=self.program.emit(rule), z=proj, weight=weight, eps=config.rms_eps, **where)
        )

    def projected(self, x, parts, label):
        """Projections side by side, each starting at a multiple of 16."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + padded_width(part.shape[0]))
        out = self.program.tensor(f"{label}.proj", x.rows, offsets[-1])
        start = 0
        for format, group in self._by_format(parts, x.width):
            for run in _aligned_runs(group):
                self._emit_linear(out, x, format, run, offsets[start])
                start += len(run)
        return out


def _aligned_runs(parts):
    """Cuts a list of tensors after each one whose rows are no multiple of 16."""
    runs = [[]]
    for part in parts:
        runs[-1].append(part)
        if part.shape[0] % 16:
            runs.append([])
    return [run for run in runs if run]
