"""Rewrites of a recorded program, each leaving every named tensor's bits as they are.

A recorded program is unfused; `lower` turns linear layers into what kernels do (prepare the rows, multiply), and `fuse`
joins neighbours so that rows pass through memory less often.
"""

from collections import Counter

from lockstep.ops.activations import bf16_width, q8_width
from lockstep.runtime.program import Op, Tensor

QUANTIZED = ("quantize_q8", q8_width)
PREPARATIONS = {
    "f32": None,
    "f16": None,
    "bf16": ("round_bf16", bf16_width),
    "q8_0": QUANTIZED,
    "q4_0": QUANTIZED,
    "q4_1": QUANTIZED,
    "q5_0": QUANTIZED,
    "q5_1": QUANTIZED,
    "q4_k": QUANTIZED,
    "q5_k": QUANTIZED,
    "q6_k": QUANTIZED,
}


def lower(program):
    """Every `linear` becomes `linear_<format>` on prepared rows; rows prepared alike are prepared once."""
    ops, prepared = [], {}
    for op in program.ops:
        if op.kind != "linear":
            ops.append(op)
            continue
        x, weight = op.inputs
        row = _prepared(program, ops, prepared, x, weight.format)
        features = -(-weight.shape[0] // 16) * 16
        ops.append(
            Op(
                f"linear_{weight.format}",
                op.outputs,
                (row, row, weight),
                dict(
                    K=x.width, width=op.params["width"], has_residual=0, column=op.params["column"], features=features
                ),
            )
        )
    return program.rewritten(ops)


def _prepared(program, ops, prepared, x, format):
    if PREPARATIONS[format] is None:
        return x
    kind, width = PREPARATIONS[format]
    if (x, kind) not in prepared:
        out = program.tensor(f"{x.name}.{kind}", x.rows, width(x.width), "i8")
        ops.append(Op(kind, (out,), (x,), dict(K=x.width)))
        prepared[x, kind] = out
    return prepared[x, kind]


def fuse(program, kinds):
    """Joins residual additions with linear layers; norms and silu_mul with the preparation of their rows, where the
    backend has the fused op (kinds)."""
    return fuse_preparations(fuse_residuals(program), kinds)


def _uses(program):
    return Counter(v for op in program.ops for v in op.inputs if isinstance(v, Tensor))


def _writers(program):
    return Counter(v for op in program.ops for v in op.outputs)


def fuse_residuals(program):
    """add(x, linear(h)) becomes one linear with a residual, if nothing else reads the linear's output."""
    uses, writers = _uses(program), _writers(program)
    made = {op.outputs[0]: op for op in program.ops if op.kind.startswith("linear_") and writers[op.outputs[0]] == 1}
    joined = {}
    for op in program.ops:
        if op.kind == "add" and op.inputs[1] in made and uses[op.inputs[1]] == 1 and op.inputs[0] != op.inputs[1]:
            joined[made[op.inputs[1]]] = op
    ops = []
    for op in program.ops:
        if op in joined:
            add = joined[op]
            ops.append(
                Op(op.kind, add.outputs, (op.inputs[0], add.inputs[0], op.inputs[2]), {**op.params, "has_residual": 1})
            )
        elif op not in joined.values():
            ops.append(op)
    return program.rewritten(ops)


def fuse_preparations(program, kinds):
    """rms_norm or silu_mul followed only by a preparation becomes one op."""
    uses, made = _uses(program), {op.outputs[0]: op for op in program.ops if op.kind in ("rms_norm", "silu_mul")}
    joined = {}
    for op in program.ops:
        first = made.get(op.inputs[0]) if op.inputs and isinstance(op.inputs[0], Tensor) else None
        if first and f"{first.kind}+{op.kind}" in kinds and uses[op.inputs[0]] == 1:
            joined[op] = first
    ops = []
    for op in program.ops:
        if op in joined:
            first = joined[op]
            params = {"K": op.params["K"], **{k: v for k, v in first.params.items() if k != "width"}}
            ops.append(Op(f"{first.kind}+{op.kind}", op.outputs, first.inputs, params))
        elif op not in joined.values():
            ops.append(op)
    return program.rewritten(ops)
