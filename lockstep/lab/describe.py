"""A model in numbers: tensors by format, ops with their shapes, bytes and FLOPs, and the memory they need."""

import itertools
import math
import re
from dataclasses import dataclass

from lockstep.engine.cache.pages import most_pages
from lockstep.engine.cache.size import page_bytes, request_bytes, weight_bytes
from lockstep.engine.speculation.drafts import MOST_BY_ITSELF
from lockstep.formats import FORMATS
from lockstep.formats.parts.panels import num_panels
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.elementwise.embed import Embed, MappedEmbed
from lockstep.ops.linear.experts import ExpertLinear
from lockstep.runtime.program import DTYPES, Tensor, Weight

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class OpCost:
    """An op of the recorded program: its output, the weight bytes it reads once in a step, and its work for each row.

    layer: the number of its decoder layer, or None. label: the name of its output without that number. weights: in
    words. row_bytes: bytes that a row reads and writes of activations.
    """

    kind: str
    label: str
    layer: int | None
    rows: str
    width: int
    weights: str
    weight_bytes: int
    row_bytes: int
    flops: int


def op_costs(program, context):
    """Every op of a recorded program. context: how many tokens a row of attention looks back on."""
    kept = {tensor for op in program.ops for tensor in op.kept}
    return [_op_cost(op, context, kept) for op in program.ops]


def _op_cost(op, context, kept):
    is_optional = not op.kept or op.rows == "E"  # it works only for the rows of requests that need it
    values = (*op.outputs, *op.inputs)
    tensors = set() if is_optional else kept.intersection(value for value in values if isinstance(value, Tensor))
    weights, name = [value for value in op.inputs if isinstance(value, Weight)], op.outputs[0].name
    layer = LAYER.search(name)
    return OpCost(
        kind=op.kind,
        label=LAYER.sub("*", name),
        layer=int(layer[0]) if layer else None,
        rows=op.rows,
        width=op.outputs[0].width,
        weights=", ".join(f"{weight.format} {'x'.join(map(str, weight.shape))}" for weight in weights),
        weight_bytes=_read_bytes(op, weights),
        row_bytes=sum(tensor.width * DTYPES[tensor.dtype].itemsize for tensor in tensors),
        flops=0 if is_optional else int(op.flops(context)),
    )


def _read_bytes(op, weights):
    if isinstance(op, Embed):
        return 0  # one row is read per token
    return sum(packed_bytes(op, w) if w in op.packed else 4 * math.prod(w.shape) for w in weights)


def is_linear(op):
    """Whether an op of a recorded program multiplies by packed weights; an op of experts has the weights of all."""
    return bool(op.packed) and not isinstance(op, Embed)


def packed_bytes(op, weight):
    """Bytes of a linear layer's weight as the op's kernel reads it, padding included: in a dense layout where the width
    allows one and experts do not share the op. (A matrix of uncommon exponents keeps plain panels, which take more.)"""
    format, (rows, K) = FORMATS[weight.format], weight.shape
    if format.dense is None or K % format.dense.block_size or isinstance(op, ExpertLinear):
        return num_panels(rows) * format.panel_bytes(K)
    return num_panels(rows) * K // format.dense.block_size * (format.dense.group_bytes + format.dense.header_bytes)


def collapsed(costs):
    """Ops grouped by layer, equal layers shown once: [(layer numbers or None, [OpCost, ...]), ...] in order."""
    groups, seen = [], {}
    for layer, run in itertools.groupby(costs, lambda cost: cost.layer):
        ops = list(run)
        key = tuple((cost.kind, cost.label, cost.width, cost.weights, cost.flops) for cost in ops)
        if layer is not None and key in seen:
            seen[key][0].append(layer)
            continue
        group = ([layer] if layer is not None else None, ops)
        groups.append(group)
        seen[key] = group
    return groups


def memory(program, mtp=None):
    """Bytes of memory by use, {name: bytes}.

    packed_weights, embedding (as stored, without tables that stay in their file), table_in_file (those), constants;
    kv_cache_per_token: of layers that see all keys; windows_per_request: of layers with a window; state_per_request:
    recurrent states; drafts_per_request: memory for drafts, with the default number of drafts; mtp_weights and
    mtp_cache_per_token: of the MTP head, whose recorded program is `mtp` (None: no head).
    """
    linear = {w.name: (op, w) for op in program.ops if is_linear(op) for w in op.inputs if isinstance(w, Weight)}
    tables = {w.name: w for op in program.ops if isinstance(op, Embed) for w in op.inputs}
    in_file = {w.name for op in program.ops if isinstance(op, MappedEmbed) for w in op.inputs}
    small = [w for w in program.weights() if w.name not in linear and w.name not in tables]
    return dict(
        packed_weights=sum(packed_bytes(*each) for each in linear.values()),
        embedding=_stored_bytes(w for w in tables.values() if w.name not in in_file),
        table_in_file=_stored_bytes(w for w in tables.values() if w.name in in_file),
        constants=sum(4 * math.prod(w.shape) for w in small),
        kv_cache_per_token=_cache_per_token(program),
        windows_per_request=_windows_per_request(program),
        state_per_request=request_bytes(program, 0),
        drafts_per_request=request_bytes(program, MOST_BY_ITSELF) - request_bytes(program, 0),
        mtp_weights=weight_bytes(program, mtp) - weight_bytes(program) if mtp else 0,
        mtp_cache_per_token=_cache_per_token(mtp) if mtp else 0,
    )


def _stored_bytes(weights):
    return sum(part.data.nbytes for weight in weights for part in weight.parts)


def _cache_per_token(program):
    return page_bytes(program).get(0, 0) // PAGE_TOKENS


def _windows_per_request(program):
    """Bytes of KV cache that a decoding request holds in layers with a window."""
    return sum(each * most_pages(window) for window, each in page_bytes(program).items() if window)


def parameters(program):
    """How many numbers the weights of a recorded program have, without an MTP head, vision and what no op reads."""
    return sum(math.prod(weight.shape) for weight in program.weights())


def formats(infos):
    """{format: (number of tensors, parameters, bytes)} of a checkpoint, the largest first."""
    totals = {}
    for info in infos:
        count, size, stored = totals.get(info.format, (0, 0, 0))
        totals[info.format] = (count + 1, size + math.prod(info.shape), stored + info.num_bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1][2]))
