"""Linear layers as register tiles: rows of activations by panels of sixteen features, through all of K or a part.

A tile is `rows` x `cols` vectors of `lanes` features. The target decides how large a tile fits its registers, and which
instruction makes dots. A format's function of a `Site` emits the loop over K and returns the accumulators.
"""

from enum import Enum
from functools import cache
from typing import NamedTuple

from lockstep.formats.format import CODE_VECTORS
from lockstep.formats.parts.rows import BIAS, BLOCK, BLOCK_BYTES, SCALE, SCALED_BIAS, SUMS
from lockstep.native import targets
from lockstep.native.emit import counted, fma, ir, moved, pointer, prefetch, read, spread, vector, write
from lockstep.native.flushing import ieee_additions
from lockstep.native.simd import F32, I1, I8, I32, I64, LANES, constant


class Rows(NamedTuple):
    """Prepared rows of activations: where the first lies, and bytes from one to the next."""

    address: int
    stride: int


class Panels(NamedTuple):
    """A run of packed panels, and how much of K is multiplied: addresses of codes and scales (0 in formats without a
    stream of scales), each with the bytes from one panel to the next. unpacked: where panels of a dense layout become
    plain ones, or codes are unpacked, one panel after the other, for all tiles that follow; 0: nowhere."""

    codes: int
    codes_stride: int
    scales: int
    scales_stride: int
    K: int
    unpacked: int


class Output(NamedTuple):
    """Where rows of out begin, bytes from one to the next, and the same of what is added to them (0: nothing): a
    residual, or one row of biases for all, 0 bytes apart; how many panels are stored, whether out already holds the
    sums over the part of K before this one (0: no), and whether this part of K is the last (0: no)."""

    address: int
    stride: int
    added: int
    added_stride: int
    num_panels: int
    resume: int
    is_last: int


class Ahead(NamedTuple):
    """The panels that will be read next, as in `Panels`; panel p of them is prefetched meanwhile if bit p of panel_mask
    is set."""

    codes: int
    codes_stride: int
    scales: int
    scales_stride: int
    panel_mask: int


class Use(Enum):
    """What a site does with the vectors of `Site.unpack`: makes them, makes and writes them, or reads them."""

    OWN = "own"
    WRITE = "write"
    READ = "read"


class Site:
    """Where a tile is emitted: its shape, the target's instructions, and pointers to its operands.

    columns: for each vector of `lanes` features the number of its panel and its first feature there. x: a pointer to
    each row; w, scales: to the panel of each column. The pointers do not change in the loop over K, so that an
    instruction addresses by pointer, index and constant. start: the initial values of the accumulators. prefetched: for
    each panel that may be prefetched (whether it is, pointers to its codes and its scales), distance: how many bytes
    ahead of the current block, locality: into which cache. is_last: whether the part of K is the last. num_vectors,
    use: of what codes are unpacked to, `Format.unpacked_on` and a `Use`.
    """

    def __init__(self, b, magic, height, columns, lanes, x, w, *, num_vectors=0, use=Use.OWN):
        self.b, self.magic, self.K = b, magic, w.K
        self.target, self.cpu = targets.of(magic), targets.Cpu(*magic)
        self.rows, self.cols, self.lanes, self.panels = height, len(columns), lanes, [p for p, _ in columns]
        self.first = [first for _, first in columns]
        self.cells = [(r, c) for r in range(self.rows) for c in range(self.cols)]
        self.floats, self.ints = vector(F32, self.lanes), vector(I32, self.lanes)
        self.x = self.pointers(x.address, x.stride, range(height))
        self.w = self.pointers(w.codes, w.codes_stride, self.panels)
        self.scales = self.pointers(w.scales, w.scales_stride, self.panels)
        self.unpacked, self.num_vectors, self.use = w.unpacked, num_vectors, use
        self.vectors = self._vectors(w) if self.shares else []
        self.start = {cell: constant(self.floats, 0.0) for cell in self.cells}
        self.prefetched, self.distance, self.locality = [], 0, self.target.machine.prefetch_locality(self.cpu)
        self.flushes, self.is_last = False, constant(I1, 1)

    def _vectors(self, w):
        """For each column where it is unpacked to: its panel's features lie apart, `lanes` of them after the other, so
        that the columns of a panel that are worked on in turns share no cache line."""
        b, parts = self.b, LANES // self.lanes
        stride = b.mul(b.udiv(w.K, self.int(BLOCK)), self.int(self.unpacked_bytes))
        numbers = [parts * p + first // self.lanes for p, first in zip(self.panels, self.first, strict=True)]
        return self.pointers(w.unpacked, stride, numbers)

    @property
    def shares(self):
        """Whether other tiles read what codes are unpacked to."""
        return self.use is not Use.OWN

    @property
    def reads(self):
        """Whether another tile has unpacked the codes."""
        return self.use is Use.READ

    @property
    def unpacked_bytes(self):
        """Of a column and 32 weights."""
        return 4 * self.lanes * self.num_vectors

    def int(self, value):
        return ir.Constant(I64, value)

    def pointers(self, address, stride, numbers):
        """Pointers to address + stride * n for each n of the numbers."""
        return [pointer(self.b, self.b.add(address, self.b.mul(stride, self.int(n)))) for n in numbers]

    def code(self, r, i, offset):
        """A pointer into row r's block i of quantized activations, see QUANTIZED_BLOCK in rows.py."""
        return moved(self.b, moved(self.b, self.x[r], self.b.mul(i, self.int(BLOCK_BYTES))), offset)

    def a_scale(self, r, i):
        return self.code(r, i, SCALE)

    def bias(self, r, i):
        return self.code(r, i, BIAS)

    def scaled_bias(self, r, i):
        return self.code(r, i, SCALED_BIAS)

    def sums(self, r, i):
        return self.code(r, i, SUMS)

    def codes(self, c, start, offset):
        """Four codes of each feature of column c, at start + offset."""
        place = moved(self.b, moved(self.b, self.w[c], start), offset + 4 * self.first[c])
        return read(self.b, place, vector(I8, 4 * self.lanes), 4 * self.lanes)

    def out_offset(self, c):
        """The byte of a row of out at which column c begins."""
        return 64 * self.panels[c] + 4 * self.first[c]

    def unpack(self, i, codes, *others):
        """What block i of 32 weights is unpacked to: `Format.unpacked_on` vectors of each column.

        codes(c, g): the codes of groups g and g + 1 of column c, for an even g below 8. others: (type of a vector,
        function of c that makes it). Returns the functions, which make a vector once, or read what another site wrote.
        """
        makes = [make for _, make in others]
        if not self.shares:
            return tuple(cache(make) for make in (codes, *makes))
        count = CODE_VECTORS + len(others)
        assert self.num_vectors == count, f"{count} vectors of {self.num_vectors}"
        start = self.b.mul(i, self.int(self.unpacked_bytes))
        place = lambda c, n: moved(self.b, moved(self.b, self.vectors[c], start), 4 * self.lanes * n)

        def kept(c, n, v):
            write(self.b, place(c, n), v, 4 * self.lanes)
            return v

        if self.use is Use.WRITE:
            pairs = cache(lambda c, g: [kept(c, g + half, v) for half, v in enumerate(codes(c, g))])
            made = enumerate(makes, CODE_VECTORS)
            return pairs, *(cache(lambda c, n=n, make=make: kept(c, n, make(c))) for n, make in made)
        load = lambda c, n, kind: read(self.b, place(c, n), kind, 4 * self.lanes)
        quads = vector(I8, 4 * self.lanes)
        pairs = cache(lambda c, g: [load(c, g, quads), load(c, g + 1, quads)])
        kinds = enumerate((kind for kind, _ in others), CODE_VECTORS)
        return pairs, *(cache(lambda c, n=n, kind=kind: load(c, n, kind)) for n, kind in kinds)

    def fetch(self, i, panel_bytes, scale_bytes):
        """Prefetches the blocks that lie `distance` after block i: through the arithmetic of several rows, the
        hardware's own prefetcher does not follow the stream of weights."""
        b, i = self.b, self.b.add(i, self.int(self.distance // panel_bytes))
        for is_prefetched, codes, scales in self.prefetched:
            with b.if_then(is_prefetched):
                block = moved(b, codes, b.mul(i, self.int(panel_bytes)))
                for line in range(0, panel_bytes, self.target.machine.line_bytes(self.cpu)):
                    prefetch(b, moved(b, block, line), self.locality)
                if scale_bytes:
                    prefetch(b, moved(b, scales, b.mul(i, self.int(scale_bytes))), self.locality)

    def blocks(self, size, body, panel_bytes=0, scale_bytes=0):
        """The accumulators after body(i, accumulators) for each of K / size blocks.

        panel_bytes, scale_bytes: of a block in a panel, where prefetching pays; 0: nothing is prefetched.
        """

        def step(i, values):
            if panel_bytes:
                self.fetch(i, panel_bytes, scale_bytes)
            after = body(i, dict(zip(self.cells, values, strict=True)))
            return [after[cell] for cell in self.cells]

        values = counted(self.b, self.b.udiv(self.K, self.int(size)), [self.start[cell] for cell in self.cells], step)
        return dict(zip(self.cells, values, strict=True))


def float_steps(s, size, column):
    """acc = fma(x[k], w[k], acc), k ascending; column(place) reads one k of a panel, size bytes."""
    b = s.b

    def step(k, acc):
        columns = [column(moved(b, w, b.mul(k, s.int(size)))) for w in s.w]
        return outer(s, acc, b.mul(k, s.int(4)), 0, columns)

    return s.blocks(1, step, size)


def outer(s, acc, start, offset, columns, step=fma):
    """acc[r, c] = step(b, x[r], columns[c], acc[r, c]) for the float32 at start + offset of every row."""
    values = [spread(s.b, moved(s.b, moved(s.b, x, start), offset), F32, s.lanes) for x in s.x]
    return {(r, c): step(s.b, values[r], columns[c], acc[r, c]) for r, c in s.cells}


def finish(s, acc, out):
    """Adds what is to be added, if anything is, and stores the first out.num_panels panels."""
    b, outs = s.b, s.pointers(out.address, out.stride, range(s.rows))
    with b.if_else(b.icmp_signed("!=", out.added, s.int(0))) as (then, otherwise):
        with then, ieee_additions(b, s.flushes) as add:
            added = s.pointers(out.added, out.added_stride, range(s.rows))
            _store(
                s,
                out.num_panels,
                lambda r, c, at: write(
                    b, moved(b, outs[r], at), add(read(b, moved(b, added[r], at), s.floats, 4), acc[r, c]), 4
                ),
            )
        with otherwise:
            _store(s, out.num_panels, lambda r, c, at: write(b, moved(b, outs[r], at), acc[r, c], 4))


def _store(s, num_panels, store):
    for c in range(s.cols):
        with s.b.if_then(s.b.icmp_signed(">", num_panels, s.int(s.panels[c]))):
            for r in range(s.rows):
                store(r, c, s.out_offset(c))


def begin(s, out):
    """Starts from the sums that a tile over the part of K before left in out, if any; prefetches what is added."""
    b, zeros = s.b, list(s.start.values())
    with b.if_then(b.icmp_signed("!=", out.added, s.int(0))):
        for place in s.pointers(out.added, out.added_stride, range(s.rows)):
            for p in sorted(set(s.panels)):
                prefetch(b, moved(b, place, 64 * p), s.locality)
    with b.if_else(b.icmp_signed("!=", out.resume, s.int(0))) as (then, otherwise):
        with then:
            outs = s.pointers(out.address, out.stride, range(s.rows))
            held = [read(b, moved(b, outs[r], s.out_offset(c)), s.floats, 4) for r, c in s.cells]
            held_from = b.block
        with otherwise:
            zeros_from = b.block
    for cell, value, zero in zip(s.cells, held, zeros, strict=True):
        s.start[cell] = b.phi(s.floats)
        s.start[cell].add_incoming(value, held_from)
        s.start[cell].add_incoming(zero, zeros_from)


def look_ahead(s, ahead, streams=True, one_row_ahead=None):
    """Sets what is prefetched: of a single panel that `streams` by the bytes that follow, else the panels of `ahead`.
    one_row_ahead: see `Format`.

    Nothing by the second column of a panel, as the first has fetched whole lines; nor, where a vector of numbers is
    several registers, by tiles of many rows: their loops are too short to ask each time whether they shall.
    """
    distance = s.target.machine.ahead_bytes(s.lanes, s.target.lanes)
    if not distance or s.first[0] or (s.lanes > s.target.lanes and not streams):
        return
    panels = sorted(set(s.panels))
    if streams and len(panels) == 1:
        s.prefetched = [(constant(I1, 1), s.w[0], s.scales[0])]
        s.distance = min(distance, one_row_ahead or distance) if s.rows == 1 else distance
        return
    for p in panels:
        [codes] = s.pointers(ahead.codes, ahead.codes_stride, [p])
        [scales] = s.pointers(ahead.scales, ahead.scales_stride, [p])
        s.prefetched.append((s.b.trunc(s.b.lshr(ahead.panel_mask, s.int(p)), I1), codes, scales))


def fields(b, tuple_type, value):
    """The LLVM values of the fields of a named tuple, as a named tuple of the same class."""
    return tuple_type.instance_class(*(b.extract_value(value, i) for i in range(len(tuple_type.fields))))
