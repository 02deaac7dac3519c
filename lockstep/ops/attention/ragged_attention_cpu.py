"""Attention of a ragged batch over pages of any size: the fast kernels, one for each type of pages.

How the work is shared among threads is in `work`, how a page is worked on in `pages_rows`.
"""

from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import peek
from lockstep.ops.attention.pages_rows import LAYOUTS, SCRATCH_BYTES, Strides
from lockstep.ops.attention.ragged_attention import RaggedAttention
from lockstep.ops.attention.work import Call, attend_claimed
from lockstep.runtime.step import COUNTER, entry

LAYOUT = LAYOUTS["f32"]  # a constant of each variant: the layout of its pages


@inlined
def call_of(a):
    """The Call of an op row."""
    return Call(
        num_seqs=entry(a.num_seqs, 0),
        query_start=a.cu_q_lens,
        kv_lens=a.kv_lens,
        table=a.page_indices,
        table_row=a.table_row,
        num_tokens=a.num_tokens,
        q=a.q,
        q_token=a.q_token,
        q_head=a.q_head,
        out=a.out,
        out_token=a.out_token,
        out_head=a.out_head,
        q_bf16=a.q_bf16,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        unit_heads=a.unit_heads,
        head_dim=a.head_dim,
        window=a.window,
        scale=a.scale,
        cap=a.cap,
        sinks=a.sinks,
        v_scale=a.v_scale,
        gate=0,
        gate_token=0,
        gate_head=0,
        stats=0,
        states=a.states,
        k=a.k,
        v=a.v,
        strides=Strides(a.page_size, a.k_page, a.k_slot, a.k_head, a.v_page, a.v_slot, a.v_head),
    )


def attend(op, step, thread, num_threads):
    """One thread of a call; step is not used."""
    call, memory = call_of(RaggedAttention.read(op)), stack_memory(SCRATCH_BYTES)
    attend_claimed(call, LAYOUT, True, False, peek(op + 8 * COUNTER, int64), thread, num_threads, memory)


KERNELS = {}  # by the type of pages
for pages, layout in LAYOUTS.items():
    name = f"ragged_attention_{pages}"
    globals()[name] = KERNELS[pages] = variant(attend, name, LAYOUT=layout)
