"""Rotary position embedding: the tables of cosines and sines, and the rotation of one head. Definitions.

Nothing here calls libm: frequencies, angles and the two tables are computed by + - * / on float64, which give the same
bits everywhere, and rounded once to float32. Because a float32 frequency times a position below 2^28 is exact in
float64, the only error of a table entry is that of the polynomials (1e-16) and the last rounding.
"""

import math
from dataclasses import dataclass

import numpy as np

from lockstep.native.kernel import definition
from lockstep.native.simd import fma
from lockstep.runtime.executor import aligned

MAX_POSITIONS = 1 << 20  # up to here the tables have the error that RopeTables states
POSITIONS_AT_ONCE = 512  # with 64 frequencies 0.8 ms

LN2, PI = 0.6931471805599453, 3.141592653589793
# pi/2 in two parts; the first has 33 bits, so that its product with an integer below 2^20 is exact
TWO_OVER_PI, HALF_PI_HIGH, HALF_PI_LOW = 0.6366197723675814, 1.5707963267341256, 6.077100506506192e-11
SIN_TERMS = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
COS_TERMS = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(9, -1, -1))


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered for contexts longer than the trained one; names as in Hugging Face configs.

    kind: "default", "linear", "llama3", "yarn", "longrope" or "proportional". factors: of longrope, one for each pair
    of channels; they are rounded to float32, in which all containers hold them.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3, yarn, longrope
    attention_factor: float | None = None  # yarn, longrope: multiplies both tables; its default depends on factor
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    partial_rotary_factor: float = 1.0  # proportional: the share of the channels whose pairs turn at all
    factors: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True)
class Growth:
    """How rotated queries grow with their position: times 1 + beta ln(1 + floor(position / context)).

    Source: Ministral 3, "llama_4_scaling_beta" in transformers 5 `modeling_ministral3.py`; Llama 4 before it.
    """

    beta: float
    context: int

    def factors(self, start: int, end: int) -> np.ndarray:
        """Of positions start to end - 1, float64 [end - start]; libm is not called."""
        whole = np.arange(start, end) // self.context
        known = {n: 1.0 + self.beta * natural_log(1.0 + n) for n in np.unique(whole).tolist()}
        return np.array([known[n] for n in whole.tolist()])


def natural_log(x):
    """ln x of a positive float64, without libm: x = m 2^e with m near 1, then the series of atanh."""
    m, e = math.frexp(x)
    if m < 0.7071067811865476:
        m, e = m * 2.0, e - 1
    t = (m - 1.0) / (m + 1.0)
    total = 0.0
    for n in range(25, 0, -2):
        total = total * (t * t) + 1.0 / n
    return e * LN2 + 2.0 * t * total


def natural_exp(x):
    """e**x in float64, without libm."""
    n = math.floor(x / LN2 + 0.5)
    r = x - n * LN2
    total = 1.0
    for k in range(18, 0, -1):
        total = 1.0 + r / k * total
    return math.ldexp(total, n)


def inverse_frequencies(rope_dim, theta, scaling=RopeScaling()):
    """Radians per position of each pair of channels, as float32.

    Shapes: [rope_dim / 2]. Error: 1e-6 relative to the float32 values of transformers.
    Order: theta^(-2i / rope_dim) in float64, the scaling in float64, one rounding.
    Source: RoFormer (Su et al. 2021); scalings as in transformers 5 `modeling_rope_utils.py`.
    """
    plain = [natural_exp(-2.0 * i / rope_dim * natural_log(theta)) for i in range(rope_dim // 2)]
    if scaling.kind not in SCALINGS:
        raise ValueError(f"rope scaling {scaling.kind!r} is not supported; supported: {', '.join(sorted(SCALINGS))}")
    return np.array(SCALINGS[scaling.kind](plain, theta, scaling), np.float32)


def _llama3(plain, theta, scaling):
    old, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor

    def lowered(frequency):
        turns = old * frequency / (2.0 * PI)  # how often the pair turned in the trained context
        if turns < low:
            return frequency / scaling.factor
        if turns > high:
            return frequency
        smooth = (turns - low) / (high - low)
        return (1.0 - smooth) * frequency / scaling.factor + smooth * frequency

    return [lowered(f) for f in plain]


def _yarn(plain, theta, scaling):
    rope_dim = 2 * len(plain)

    def channel(turns):  # the channel pair that makes `turns` turns in the trained context
        return (
            rope_dim
            * natural_log(scaling.original_max_position_embeddings / (turns * 2.0 * PI))
            / (2.0 * natural_log(theta))
        )

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    width = high - low if high != low else 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    return [f / scaling.factor * r + f * (1.0 - r) for f, r in zip(plain, ramp, strict=True)]


def _proportional(plain, theta, scaling):
    """All channels of a head are paired half a head apart; the first pairs turn, the others stand still."""
    num_turning = int(scaling.partial_rotary_factor * 2 * len(plain)) // 2
    return [f / scaling.factor if i < num_turning else 0.0 for i, f in enumerate(plain)]


def _longrope(plain, theta, scaling):
    return [f / float(np.float32(own)) for f, own in zip(plain, scaling.factors, strict=True)]


SCALINGS = {
    "default": lambda plain, theta, scaling: plain,
    "linear": lambda plain, theta, scaling: [f / scaling.factor for f in plain],
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
    "longrope": _longrope,
}


def attention_factor(scaling):
    """The factor of both tables: 1 except for yarn and longrope. That of longrope is a float32, as GGUF has it."""

    def mscale(weight):
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * natural_log(scaling.factor) + 1.0

    if scaling.kind == "longrope":
        return float(np.float32(_longrope_factor(scaling)))
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope_factor(scaling):
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1.0 + natural_log(scaling.factor) / natural_log(scaling.original_max_position_embeddings))


class RopeTables:
    """Tables of cosines and sines of all positions, times the attention factor, computed as far as steps need them.

    growth: of queries, whose tables these are: both are multiplied by its factors, too.

    Rows that are not computed are not touched, so that a long context costs no memory before it is used. A row is a
    function of its position only: it does not matter when, or with which other rows, it was computed.

    Shapes: cos_PR, sin_PR float32 [num_positions, rope_dim / 2], zero from num_covered on. Error: 0.5 ulp of float32
      and 1e-15, for positions below MAX_POSITIONS.
    """

    def __init__(
        self,
        num_positions: int,
        rope_dim: int,
        theta: float,
        scaling: RopeScaling = RopeScaling(),
        growth: Growth | None = None,
    ):
        self._frequency_R, self._factor = inverse_frequencies(rope_dim, theta, scaling), attention_factor(scaling)
        self._growth = growth
        shape = num_positions, rope_dim // 2
        self.cos_PR, self.sin_PR = (aligned(4 * shape[0] * shape[1]).view(np.float32).reshape(shape) for _ in range(2))
        self.num_covered = 0

    def cover(self, num_positions: int) -> None:
        """Computes the rows of the first num_positions positions that are not computed yet, and some more."""
        start = self.num_covered
        if num_positions > start:
            end = min(-(-num_positions // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE, len(self.cos_PR))
            factor_P = self._factor * (self._growth.factors(start, end) if self._growth else np.ones(end - start))
            fill_table(self._frequency_R, factor_P, start, self.cos_PR[start:end], self.sin_PR[start:end])
            self.num_covered = end


@definition
def fill_table(frequency_R, factor_P, start, cos_PR, sin_PR):
    """cos and sin of position * frequency, times the position's factor, for positions from `start` on.

    Order: in float64: the angle (exact), less n * pi/2 in two steps with n the nearest integer, two Taylor polynomials
      by Horner's rule, swapped and negated by n mod 4, times factor; then one rounding to float32.
    """
    for i in range(frequency_R.size):
        frequency = np.float64(frequency_R[i])
        for p in range(cos_PR.shape[0]):
            angle = np.float64(start + p) * frequency
            n = math.floor(angle * TWO_OVER_PI + 0.5)
            turn = np.float64(n)
            r = (angle - turn * HALF_PI_HIGH) - turn * HALF_PI_LOW
            square, sine, cosine = r * r, 0.0, 0.0
            for term in SIN_TERMS:
                sine = sine * square + term
            for term in COS_TERMS:
                cosine = cosine * square + term
            sine = sine * r
            quarter = int(n) % 4
            if quarter % 2 == 1:
                sine, cosine = cosine, -sine
            if quarter >= 2:
                sine, cosine = -sine, -cosine
            cos_PR[p, i], sin_PR[p, i] = np.float32(cosine * factor_P[p]), np.float32(sine * factor_P[p])


@definition
def rotate(x_K, cos_R, sin_R, out_K):
    """Rotates each pair of channels (i, i + R) by its angle; channels from 2 R on pass through.

    Shapes: x, out [K] float32; cos, sin [R] float32 with 2 R <= K, the rows of the tables at the token's position.
    Error: 1 ulp of the larger of the pair.
    Order: out[i] = fma(x[i], cos, x[i + R] * -sin), out[i + R] = fma(x[i + R], cos, x[i] * sin).
    Source: the "NeoX" pairing, as in all Hugging Face models served here.
    """
    R = cos_R.size
    for i in range(R):
        low, high = x_K[i], x_K[i + R]
        out_K[i] = fma(low, cos_R[i], high * -sin_R[i])
        out_K[i + R] = fma(high, cos_R[i], low * sin_R[i])
    for i in range(2 * R, x_K.size):
        out_K[i] = x_K[i]
