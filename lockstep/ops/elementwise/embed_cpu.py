"""Rows of the embedding matrix: the fast kernel. Bound by reading these rows; no others are touched."""

from lockstep.formats import FORMATS
from lockstep.native.kernel import variant
from lockstep.ops.elementwise.embed import MAPPED, RAW, Embed, row_bytes, row_of
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows

# constants of a variant: STORE decodes and stores COUNT weights; a block has SIZE weights in BLOCK_BYTES
STORE = COUNT = SIZE = BLOCK_BYTES = None


def embed(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a, token_ids = Embed.read(op), StepBlock.read(step).token_ids
    size = row_bytes(a.width, SIZE, BLOCK_BYTES)
    for t in range(thread, num_rows(op, step), num_threads):
        row, out = a.table.codes + size * row_of(entry(token_ids, t), a.num_rows), a.out + 4 * a.width * t
        for i in range(0, a.width, COUNT):
            STORE(row + i // SIZE * BLOCK_BYTES, a.scale, out + 4 * i)


CPU = {}
for _name, _format in FORMATS.items():
    _constants = dict(STORE=_format.lookup.store, COUNT=_format.lookup.num_weights)
    _constants |= dict(SIZE=_format.block_size, BLOCK_BYTES=_format.block_bytes)
    globals()[f"embed_{_name}"] = variant(embed, f"embed_{_name}", **_constants)
    CPU[f"embed_{_name}"] = Implementation(globals()[f"embed_{_name}"], RAW)
    CPU[f"mapped_embed_{_name}"] = Implementation(globals()[f"embed_{_name}"], MAPPED)
