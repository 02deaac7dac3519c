"""The gated delta rule: the recurrence that defines it, and a chunked form that trains much faster.

Per value head, with a state S of shape [K, V], at every token: S = exp(g) S; S = S + k (beta (v - S^T k))^T; o = S^T q.
Shapes: q, k [B, H, T, K], v [B, H, T, V], g and beta [B, H, T]; q and k already normalised, q already scaled.
"""

import torch


def delta_rule_recurrent(q, k, v, g, beta):
    """The definition, one token after the other."""
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        seen = torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        delta = (v[:, :, t] - seen) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * delta[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2)


class UnitLowerInverse(torch.autograd.Function):
    """(I - A)^-1 for strictly lower triangular A: inverse blocks of doubling size, stable where a power series is
    not."""

    @staticmethod
    def forward(ctx, a):
        size = a.shape[-1]
        row = torch.arange(size, device=a.device)
        inverse = torch.eye(size, device=a.device, dtype=a.dtype).expand_as(a)
        half = 1
        while half < size:
            # rows in the lower half, columns in the upper half of the same block
            same_block = row[:, None] // (2 * half) == row[None, :] // (2 * half)
            corner = same_block & (row[:, None] % (2 * half) >= half) & (row[None, :] % (2 * half) < half)
            inverse = inverse + inverse @ (a * corner) @ inverse
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return transposed @ grad @ transposed


def delta_rule_chunked(q, k, v, g, beta, chunk=32):
    """The same function with the tokens of a chunk solved together (WY form); T must be a multiple of the chunk."""
    # in float32 whatever the rest of the model computes in: the inverse and the state would lose too much
    with torch.autocast(q.device.type, enabled=False):
        return chunked_float(*(x.float() for x in (q, k, v, g, beta)), chunk)


def chunked_float(q, k, v, g, beta, chunk):
    batch, heads, num_tokens, _ = q.shape
    q, k, v = (x.reshape(batch * heads, num_tokens // chunk, chunk, -1) for x in (q, k, v))
    g, beta = (x.reshape(batch * heads, num_tokens // chunk, chunk) for x in (g, beta))
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()

    k_beta = k * beta[..., None]
    inverse = UnitLowerInverse.apply(-(k_beta @ k.transpose(-1, -2) * decay).tril(-1))
    new_v = inverse @ (v * beta[..., None])
    old_k = inverse @ (k_beta * total.exp()[..., None])
    scores = q @ k.transpose(-1, -2) * decay
    decayed_q = q * total.exp()[..., None]
    decayed_k = (k * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    last_decay = total[..., -1].exp()[..., None, None]
    out = scan_chunks(new_v, old_k, scores, decayed_q, decayed_k, last_decay)
    return out.reshape(batch, heads, num_tokens, -1)


def scan_chunks(new_v, old_k, scores, decayed_q, decayed_k, last_decay):
    """Carry the state from chunk to chunk."""
    # unbind once: indexing in the loop would make autograd write a full-size gradient per chunk
    chunks = zip(*(x.unbind(1) for x in (new_v, old_k, scores, decayed_q, decayed_k, last_decay)), strict=True)
    state, outputs = None, []
    for v, w, s, q, k, d in chunks:
        if state is None:
            outputs.append(s @ v)
            state = k @ v
        else:
            v = torch.baddbmm(v, w, state, alpha=-1)
            outputs.append(torch.baddbmm(s @ v, q, state))
            state = torch.baddbmm(state * d, k, v)
    return torch.stack(outputs, dim=1)
