"""Kernels of a few primitives each, whose own kernels LLVM takes long to compile; they are never run."""

from lockstep.formats.parts.tiles import Ahead, Output, Panels, Rows
from lockstep.native.kernel import Kernel, kernel, variant
from lockstep.native.machine import byte_array, int_array, kept_apart
from lockstep.native.numbers import carray, float32, int32
from lockstep.native.simd import bf16_f32, bit_xor, high_product, load, load_i32, peek, peek_bf16, poke, store
from lockstep.native.tiles import tile_fma_f32, tile_zeros
from lockstep.native.tiles_rows import ROW_NUMBERS, prefetch_row, tile_store_rows
from lockstep.ops.integer.code_tile import SCALINGS, code_tile
from lockstep.ops.math import log

LOAD = TRANSPOSE = TRANSPOSE_WIDE = FMA_ROW = PLANES = SCALING = None  # constants of a variant


def _rows(op, step, thread, num_threads):
    TRANSPOSE(op, step, thread, num_threads, 0)
    TRANSPOSE_WIDE(op, step, thread, num_threads, 0)
    store(op, LOAD(step))
    tile_store_rows(FMA_ROW(tile_zeros(1, 1), op, step, thread, num_threads, 0), op, step, thread)
    prefetch_row(op, step, thread)


def _codes(op, step, thread, num_threads):
    x, w, out = Rows(op, step), Panels(op, step, op, step, thread, 0), Output(op, step, thread, step, 1, 0, 1)
    code_tile((PLANES, (1, 2), 1, SCALING), num_threads, x, w, out, Ahead(op, step, op, step, 0), thread)


@kernel
def numbers(op, step, thread, num_threads):
    kept_apart()
    store(op, log(load(step)))
    store(op, bit_xor(high_product(load_i32(op), load_i32(step)), 128))
    poke(op, log(peek(step, float32)) + peek_bf16(step) + bf16_f32(peek(step, int32)))
    carray(int_array(op), (1,))[0] = carray(byte_array(step), (1,))[0]
    tile_store_rows(tile_fma_f32(tile_zeros(1, 1), op, step, thread, step), op, step, thread)


for _name, _numbers in ROW_NUMBERS.items():
    _functions = {k.upper(): v for k, v in _numbers._asdict().items() if k not in ("size", "wide")}
    globals()[f"rows_{_name}"] = variant(_rows, f"rows_{_name}", **_functions)
for _name, _planes in zip(SCALINGS, (1, 2), strict=True):
    globals()[f"codes_{_name}"] = variant(_codes, f"codes_{_name}", PLANES=_planes, SCALING=_name)
PATHS = [value.path for value in list(globals().values()) if isinstance(value, Kernel)]
