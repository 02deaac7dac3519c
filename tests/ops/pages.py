"""Pages of random keys and values for tests of attention: scattered over the cache, everything unused a NaN."""

import numpy as np

from lockstep.runtime.executor import aligned

NAN_BITS, NEVER = 0xFFFF, 1 << 24


def round_bf16(x):
    """The upper halves of float32, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def page_table(contexts, rng):
    """(int32 [S, P] with pages in random order, the number of pages); entries past a request's last page are NEVER, far
    outside the cache."""
    num_pages = [-(-c // 64) for c in contexts]
    order, table = rng.permutation(sum(num_pages) + 2), np.full((len(contexts), max(num_pages) + 1), NEVER, np.int32)
    for s, num in enumerate(num_pages):
        table[s, :num] = order[sum(num_pages[:s]) : sum(num_pages[: s + 1])]
    return table, len(order)


def quantize(x):
    """Codes int8 and scales bfloat16 [..., 1] of heads [..., K]."""
    scale = round_bf16(np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127))
    return np.rint(x * (np.float32(1) / widen(scale))).astype(np.int8), scale


def random_cache(contexts, G, K, kv_dtype, rng):
    """(k pages, v pages, table, k [S][C, G, K], v): the cache that attention reads, and its numbers in order."""
    table, N = page_table(contexts, rng)
    keys, values = ([rng.standard_normal((c, G, K), np.float32) for c in contexts] for _ in "kv")
    if kv_dtype == "q8":
        return quantized_cache(table, N, keys, values)
    bf16, pages = kv_dtype == "bf16", [np.full(shape, np.nan, np.float32) for shape in ((N, G, K, 64), (N, G, 64, K))]
    if bf16:
        keys, values = ([widen(round_bf16(x)) for x in xs] for xs in (keys, values))
    for s, c in enumerate(contexts):
        page, slot = table[s, np.arange(c) // 64], np.arange(c) % 64
        pages[0][page, :, :, slot], pages[1][page, :, slot] = keys[s], values[s]
    if bf16:
        bits = [np.where(np.isnan(p), NAN_BITS, round_bf16(np.nan_to_num(p))).astype(np.uint16) for p in pages]
        pages = [in_pairs(p) for p in bits]
    return *(on_cache_line(p) for p in pages), table, keys, values


def quantized_cache(table, N, keys, values):
    """`random_cache` in 8 bits, from the numbers to be cached."""
    G, K = keys[0].shape[1:]
    codes = [np.full(shape, -1, np.int8) for shape in ((N, G, K, 64), (N, G, 64, K))]
    scales = [np.full((N, G, 64), NAN_BITS, np.uint16) for _ in "kv"]
    kept = [[], []]
    for s, parts in enumerate(zip(keys, values, strict=True)):
        slots = np.arange(len(parts[0]))
        page, slot = table[s, slots // 64], slots % 64
        for i, (made, scale) in enumerate(map(quantize, parts)):
            codes[i][(page, slice(None), slice(None), slot) if i == 0 else (page, slice(None), slot)] = made
            scales[i][page, :, slot] = scale[..., 0]
            kept[i].append(made * widen(scale))
    return *(on_cache_line(in_fours(c, s)) for c, s in zip(codes, scales, strict=True)), table, *kept


def in_fours(codes, scales):
    """Codes [N, G, rows, width] int8 and scales [N, G, 64] as they lie in a cache: [N, G, 64 (K + 2)] int8."""
    N, G, rows, width = codes.shape
    fours = np.ascontiguousarray(codes.reshape(N, G, rows // 4, 4, width).swapaxes(3, 4)).reshape(N, G, -1)
    return np.concatenate([fours, np.ascontiguousarray(scales).view(np.int8).reshape(N, G, -1)], axis=-1)


def scales_of(pages):
    """The scales [N, G, 64] of q8 pages, to be changed in place."""
    return pages[..., -128:].view(np.uint16)


def in_pairs(pages):
    """Pages [N, G, rows, width] of bfloat16 as they lie in a cache: two rows together, number by number."""
    N, G, rows, width = pages.shape
    return np.ascontiguousarray(pages.reshape(N, G, rows // 2, 2, width).swapaxes(3, 4))


def by_row(pages, together=2):
    """Pages as they lie in a cache, `together` rows interleaved or one by one, as [N, G, rows, width]."""
    if pages.ndim == 4:
        return pages
    N, G, groups, width, _ = pages.shape
    return np.ascontiguousarray(pages.swapaxes(3, 4)).reshape(N, G, together * groups, width)


def on_cache_line(array):
    copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
