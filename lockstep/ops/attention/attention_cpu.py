"""Causal attention over a paged cache: the fast kernels, one for each type of cache.

How the work is shared among threads is in `work`, how a page is worked on in `pages` and `pages_q8`.
"""

from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import peek
from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.formulas import score_scales
from lockstep.ops.attention.pages import PAIRS, SINGLE
from lockstep.ops.attention.pages_q8 import QUANTIZED
from lockstep.ops.attention.pages_q8 import SCRATCH_BYTES as SCRATCH_BYTES_Q8
from lockstep.ops.attention.work import Call, attend_claimed, heads_together
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, StepBlock, pages_of

# constants of each variant. LAYOUT: of the pages; ONE_ROW: a tile is one token and one head, so that no read is shared
LAYOUT, ONE_ROW = SINGLE, False


@inlined
def call_of(a, batch, unit_heads):
    """The Call of an op in a step."""
    (scale, cap), head = score_scales(a.scale, a.soft_cap), 4 * a.head_dim
    token, table = head * a.num_heads, pages_of(batch, 0, a.page_group)
    gate = a.gate + 4 * a.gate_offset if a.gate != 0 else 0
    return Call(
        num_seqs=batch.num_requests,
        query_start=batch.query_start,
        kv_lens=batch.context_len,
        table=table,
        table_row=pages_of(batch, 1, a.page_group) - table,
        num_tokens=0,
        q=a.q,
        q_token=token,
        q_head=head,
        out=a.out,
        out_token=token,
        out_head=head,
        q_bf16=False,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        unit_heads=unit_heads,
        head_dim=a.head_dim,
        window=a.window,
        scale=scale,
        cap=cap,
        sinks=a.sinks,
        v_scale=a.v_scale,
        gate=gate,
        gate_token=4 * a.gate_width,
        gate_head=4 * a.gate_stride,
        stats=a.stats,
        states=0,
        k=a.k_pages,
        v=a.v_pages,
        strides=0,
    )


def attend(op, step, thread, num_threads):
    """One thread of an attention op."""
    a, batch, memory = Attention.read(op), StepBlock.read(step), stack_memory(SCRATCH_BYTES_Q8)
    unit_heads = min(num_threads, 1) if ONE_ROW else a.num_heads // a.num_kv_heads
    if not ONE_ROW:
        unit_heads = heads_together(call_of(a, batch, unit_heads), num_threads)
    call = call_of(a, batch, unit_heads)
    attend_claimed(call, LAYOUT, False, ONE_ROW, peek(op + 8 * COUNTER, int64), thread, num_threads, memory)


CPU, PER_TOKEN = {}, {}
for kind, layout in (("attention", SINGLE), ("attention_bf16", PAIRS), ("attention_q8", QUANTIZED)):
    for name, one_row, implementations in ((kind, False, CPU), (f"{kind}_per_token", True, PER_TOKEN)):
        globals()[name] = kernel = variant(attend, name, LAYOUT=layout, ONE_ROW=one_row)
        # sums of pairs flush denormals; where that takes a mode of the CPU, the mode holds for the whole op, whose
        # other results are `cleared` and do not depend on it
        implementations[kind] = Implementation(kernel, flushes=layout is PAIRS)
