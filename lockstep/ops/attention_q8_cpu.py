"""Causal attention over an 8-bit paged cache: the fast kernel. Work is cut and merged as in `attention_cpu`.

Many rows are bound by arithmetic (dots of four for scores, of two for values), few rows by the read of K and V:
2 * kv heads * (K + 2) bytes a token of context.
"""

from lockstep.ops.attention_block import ROWS
from lockstep.ops.attention_cpu import run
from lockstep.ops.attention_q8_block import attend_span, load_queries
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel


@inlined
def quantized(op, step, num_threads, base, has_gate, tokens_at_once, cuts):
    """8-bit pages, four numbers at a time."""
    run(op, step, num_threads, base, has_gate, tokens_at_once, cuts, load_queries, attend_span, ())


@kernel
def attention_q8(op, step, thread, num_threads):
    """All tokens and heads, in tiles."""
    quantized(op, step, num_threads, 5, False, ROWS, num_threads > 1)


@kernel
def gated_attention_q8(op, step, thread, num_threads):
    """The same, each output times the sigmoid of its gate."""
    quantized(op, step, num_threads, 6, True, ROWS, num_threads > 1)


@kernel
def attention_q8_per_token(op, step, thread, num_threads):
    """One token and one head at a time: nothing is shared."""
    quantized(op, step, num_threads, 5, False, min(num_threads, 1), False)


@kernel
def gated_attention_q8_per_token(op, step, thread, num_threads):
    """One token and one head at a time, gated."""
    quantized(op, step, num_threads, 6, True, min(num_threads, 1), False)


CPU = {"attention_q8": Implementation(attention_q8), "gated_attention_q8": Implementation(gated_attention_q8)}
PER_TOKEN = {
    "attention_q8": Implementation(attention_q8_per_token),
    "gated_attention_q8": Implementation(gated_attention_q8_per_token),
}
