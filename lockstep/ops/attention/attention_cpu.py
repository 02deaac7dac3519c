"""Causal attention over a paged cache: the fast kernels, one for each type of cache.

Who does what is in `attention_work`, and what is done with a page in `attention_pages` and `attention_pages_q8`.
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
from lockstep.ops.attention.work import Call, attend_claimed
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, StepBlock, pages_of

# Constants of each variant. LAYOUT: of the pages; ALONE: a tile is one token and one head, and nothing is shared
LAYOUT, ALONE = SINGLE, False


@inlined
def call_of(a, batch, unit_heads):
    """The Call of an op on a step."""
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
        pages=0,
    )


def attend(op, step, thread, num_threads):
    """One thread of an attention op."""
    a, memory = Attention.read(op), stack_memory(SCRATCH_BYTES_Q8)
    unit_heads = min(num_threads, 1) if ALONE else a.num_heads // a.num_kv_heads
    call = call_of(a, StepBlock.read(step), unit_heads)
    attend_claimed(call, LAYOUT, False, ALONE, peek(op + 8 * COUNTER, int64), thread, num_threads, memory)


CPU, PER_TOKEN = {}, {}
for kind, layout in (("attention", SINGLE), ("attention_bf16", PAIRS), ("attention_q8", QUANTIZED)):
    for name, alone, implementations in ((kind, False, CPU), (f"{kind}_per_token", True, PER_TOKEN)):
        globals()[name] = made = variant(attend, name, LAYOUT=layout, ALONE=alone)
        # pairs are flushed step by step; where that takes a mode it is the whole op's, which `cleared` makes invisible
        implementations[kind] = Implementation(made, flushes=layout is PAIRS)
