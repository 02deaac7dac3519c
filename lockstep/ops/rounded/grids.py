"""Grids: the values that a number may have on quantized hardware, and the rounding of a row of numbers to them.

A grid is a row of GRID_WORDS float32 in a `Setting`, so that a new grid needs no new kernel:

    OFF            0                                                    numbers stay as they are
    INTEGER        1  scale  1/scale  zero  low  high                   (code - zero) * scale, low <= code <= high
    ROW_SYMMETRIC  2  -  -  -  low  high                                the same, zero 0, the scale from the row
    ROW_ASYMMETRIC 3  -  -  -  low  high                                the same, scale and zero from the row
    FLOAT          4  scale  1/scale  mantissa  emin  emax  largest     small floats times a scale
    MICROSCALED    5  -  -  mantissa  emin  emax  largest               small floats times a power of two for each 32
    NVFP4          6  scale  1/scale                                    e2m1 times an e4m3 for each 16, times a scale
    Q8             7                                                    int8 times a float32 for each 32

All arithmetic is float32, one operation at a time; codes are whole numbers below 2**24 in float32. Rounding is to
nearest, ties to even. A number that is not finite stays NaN, or makes its row or block NaN, where a code or a scale
would hide it; only an infinity on an INTEGER or FLOAT grid saturates, as hardware does.
Sources: OCP Microscaling Formats 1.0 (2023); NVFP4: NVIDIA, scales e4m3 for 16 values.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined
from lockstep.native.machine import kept_apart
from lockstep.native.simd import exponent, maximum, minimum, pow2, rint, where_below
from lockstep.ops.elementwise.activations import magnitude
from lockstep.ops.math import ONE, ZERO

GRID_WORDS = 8
KIND, SCALE, INVERSE, ZERO_POINT, LOW, HIGH, LARGEST = range(7)
MANTISSA, EMIN, EMAX = ZERO_POINT, LOW, HIGH  # of the kinds of small floats
OFF, INTEGER, ROW_SYMMETRIC, ROW_ASYMMETRIC, FLOAT, MICROSCALED, NVFP4, Q8 = range(8)
MICROSCALED_BLOCK, NVFP4_BLOCK = 32, 16
# (mantissa bits, smallest and largest exponent, largest value) of small floats; mxint8 is 6 fraction bits below 2
SMALL_FLOATS = {
    "int8": (6, 0, 0, 127 / 64),
    "e4m3": (3, -6, 8, 448.0),
    "e5m2": (2, -14, 15, 57344.0),
    "e2m1": (1, 0, 2, 6.0),
}
INFINITY, UNKNOWN = np.float32(np.inf), np.float32(np.nan)
SMALLEST_SCALE = np.float32(1e-8)
LOWEST_EXPONENT, HIGHEST_EXPONENT = np.float32(-126), np.float32(126)
E4M3_MANTISSA, E4M3_EMIN, E4M3_EMAX, E4M3_LARGEST = (np.float32(x) for x in SMALL_FLOATS["e4m3"])
E2M1_MANTISSA, E2M1_EMIN, E2M1_EMAX, E2M1_LARGEST = (np.float32(x) for x in SMALL_FLOATS["e2m1"])
SIXTH, HIGHEST_CODE, ONE_127TH, TINY = np.float32(1 / 6), np.float32(127), np.float32(1 / 127), np.float32(1e-30)


# ------------------------------------------------------------ one number, or lanes of them


@inlined
def clamped(x, low, high):
    """x, at least low and at most high; NaN stays."""
    return where_below(x, low, low, where_below(high, x, high, x))


@inlined
def on_integers(x, scale, inverse, zero, low, high):
    """The value on an integer grid that x is rounded to.

    Order: code = clamped(rint(x * inverse) + zero), (code - zero) * scale.
    """
    return (clamped(rint(x * inverse) + zero, low, high) - zero) * scale


@inlined
def on_floats(x, mantissa, emin, emax, largest):
    """The small float that x is rounded to.

    Order: e = exponent of x, at least emin and at most emax; step = 2**(e - mantissa); rint(x / step) * step, at most
      `largest` in size. Dividing and multiplying by a power of two are exact.
    """
    shift = clamped(exponent(x), emin, emax) - mantissa
    return clamped(rint(x * pow2(ZERO - shift)) * pow2(shift), ZERO - largest, largest)


# ------------------------------------------------------------ the scale of a row or a block, from its numbers


@inlined
def symmetric_scale(amax, high):
    """The scale of an integer grid -high .. high for numbers up to amax in size."""
    return maximum(amax / high, SMALLEST_SCALE)


@inlined
def asymmetric_scale(lowest, highest, low, high):
    """(scale, zero) of an integer grid low .. high for numbers from lowest <= 0 to highest >= 0."""
    scale = maximum((highest - lowest) / (high - low), SMALLEST_SCALE)
    return scale, clamped(rint(low - lowest / scale), low, high)


@inlined
def block_exponent(amax, emax):
    """The exponent of a microscaled block with numbers up to amax in size, from -126 to 126."""
    return clamped(exponent(amax) - emax, LOWEST_EXPONENT, HIGHEST_EXPONENT)


@inlined
def nvfp4_scale(amax, scale, inverse):
    """The scale of an NVFP4 block: an e4m3 times the tensor's scale."""
    return on_floats(amax * SIXTH * inverse, E4M3_MANTISSA, E4M3_EMIN, E4M3_EMAX, E4M3_LARGEST) * scale


# ------------------------------------------------------------ rows


@definition
def largest_size(x):
    """The largest absolute value; infinity if a number is not finite."""
    amax = ZERO
    for i in range(x.size):
        amax = maximum(magnitude(x[i]), amax)
    return amax


@definition
def quantize_row(x, grid):
    """Rounds a row of float32, in place, to a grid [GRID_WORDS]. Blocks begin at the row's first number; the last one
    may be short."""
    kept_apart()  # a kernel has it in up to twenty places
    kind = int(grid[KIND])
    if kind == INTEGER:
        for i in range(x.size):
            x[i] = on_integers(x[i], grid[SCALE], grid[INVERSE], grid[ZERO_POINT], grid[LOW], grid[HIGH])
    elif kind == ROW_SYMMETRIC or kind == ROW_ASYMMETRIC:
        quantize_dynamic(x, grid, kind)
    elif kind == FLOAT:
        for i in range(x.size):
            x[i] = on_floats(x[i] * grid[INVERSE], grid[MANTISSA], grid[EMIN], grid[EMAX], grid[LARGEST]) * grid[SCALE]
    elif kind != OFF:
        size = NVFP4_BLOCK if kind == NVFP4 else MICROSCALED_BLOCK
        for start in range(0, x.size, size):
            quantize_block(x[start : min(start + size, x.size)], grid, kind)


@definition
def quantize_dynamic(x, grid, kind):
    """Rounds a row to an integer grid whose scale comes from the row's smallest and largest number, 0 included."""
    lowest, highest, amax = ZERO, ZERO, largest_size(x)
    for i in range(x.size):
        lowest, highest = minimum(x[i], lowest), maximum(x[i], highest)
    scale, zero = symmetric_scale(amax, grid[HIGH]), ZERO
    if kind == ROW_ASYMMETRIC:
        scale, zero = asymmetric_scale(lowest, highest, grid[LOW], grid[HIGH])
    inverse = ONE / scale
    for i in range(x.size):
        x[i] = UNKNOWN if amax == INFINITY else on_integers(x[i], scale, inverse, zero, grid[LOW], grid[HIGH])


@definition
def quantize_block(x, grid, kind):
    """Rounds one block of a MICROSCALED, NVFP4 or Q8 grid."""
    amax = largest_size(x)
    if amax == INFINITY:
        for i in range(x.size):
            x[i] = UNKNOWN
    elif kind == MICROSCALED:
        e = block_exponent(amax, grid[EMAX])
        for i in range(x.size):
            x[i] = on_floats(x[i] * pow2(ZERO - e), grid[MANTISSA], grid[EMIN], grid[EMAX], grid[LARGEST]) * pow2(e)
    elif kind == NVFP4:
        scale = nvfp4_scale(amax, grid[SCALE], grid[INVERSE])
        inverse = ONE / scale if scale > ZERO else ZERO
        for i in range(x.size):
            x[i] = on_floats(x[i] * inverse, E2M1_MANTISSA, E2M1_EMIN, E2M1_EMAX, E2M1_LARGEST) * scale
    else:
        inverse, scale = (HIGHEST_CODE / amax, amax * ONE_127TH) if amax >= TINY else (ZERO, ZERO)
        for i in range(x.size):
            x[i] = rint(x[i] * inverse) * scale
