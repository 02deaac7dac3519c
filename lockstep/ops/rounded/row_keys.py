"""How many keys a token's row of scores has."""

from lockstep.native.kernel import inlined
from lockstep.runtime.step import entry


@inlined
def row_keys(a, batch, t):
    """All of the token's sequence where the mask is added (a.additive), else those up to the token's own."""
    position = entry(batch.position, t)
    return entry(batch.context_len, entry(batch.request, t)) if a.additive else position + 1
