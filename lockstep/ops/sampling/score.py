"""How well rows of a model predict the tokens that follow, and how far they are from a base model: the definition.

    logits[t] = W x[t]        base[t] = W0 x0[t]        both [vocab_size], neither of which is ever in memory as a whole

Every logit is what `ops/linear/linear.py` defines (`ops/integer/code_linear.py` for a head of codes), and
log-probabilities are what `ops/sampling/sample.py` reports: the negative log-likelihood of a token is the engine's own
log-probability of it, bit for bit, with the other sign. Logits may pass a grid before they are scored; those of the
base never do.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.parts.products import codes_at, floats_at, row_dot_f32
from lockstep.native.kernel import Kernel, definition, inlined, variant
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray, float32, int32, int64
from lockstep.native.simd import fma, peek
from lockstep.ops.elementwise.activations import check_rows
from lockstep.ops.integer.code_linear import centered_row, code_dot, scaled
from lockstep.ops.integer.code_rows import check_codes, code_bytes, tail_of
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.integer.code_weights import ROWS
from lockstep.ops.linear.linear import LAYOUTS, PREPARATION, PRODUCTS, constants
from lockstep.ops.math import ONE, ZERO, exp, tree_sum
from lockstep.ops.rounded.grids import GRID_WORDS, KIND, ROW_ASYMMETRIC, ROW_SYMMETRIC, quantize_row
from lockstep.ops.sampling.sample import CHUNK, UNKNOWN, argmax, is_sound, log_normalizer, maximum_of
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, output, packed, rows, setting
from lockstep.runtime.program import Setting, Tensor, Weight
from lockstep.runtime.step import num_rows

NO_TARGET = -1
# columns of a row of scores
NLL, BASE_NLL, KL, DELTA_P, SAME_TOP, TOP, BASE_TOP, TOP_LOGPROB = range(8)
NUM_SCORES = 8
MOST_TOKENS = 2**24  # a float32 holds every token below this
# words that the fast kernel keeps of each chunk of a row, and of the target's logits behind all chunks
CHUNK_WORDS, TARGET_WORDS = 7, 2
ROW_BYTES = READ = DOT = None  # constants of a variant, as in `ops/linear/linear.py`


class Score(Operands):
    """out = for each row what `scores` says of its logits, W x, and of base logits, W0 x0.

    out: float32 [rows, 8]. x, base_x: rows of in_features values, as of `Linear`: float32 as recorded, prepared for the
    weight once lowered, or rows of codes for a head of codes. weight, base_weight [vocab_size, in_features]: heads,
    which may be one; that of the base has the same format, or is f32, which base_f32 says. target: the token that
    follows a row, -1 for none. base_x and base_weight are given both or neither. grid: to which logits W x are rounded;
    a grid with a scale for each row makes them NaN, since a row of logits is never in memory as a whole.
    """

    group = "linear"
    rules = ("0 < in_features", f"0 < vocab_size <= {MOST_TOKENS}")
    multiplied: ClassVar[dict[str, str]] = {"x": "weight", "base_x": "base_weight"}
    out: Tensor = output(f"{NUM_SCORES}")
    scratch: Tensor = output("scratch_width", scratch=True)
    x: Tensor = rows(dtype=None)
    weight: Weight = packed("vocab_size, in_features")
    target: Tensor = rows("1", dtype="i32")
    base_x: Tensor | None = rows(dtype=None, optional=True)
    base_weight: Weight | None = packed("vocab_size, in_features", optional=True)
    grid: Setting | None = setting(f"1, {GRID_WORDS}", optional=True)
    in_features: int
    vocab_size: int
    scratch_width: int
    base_f32: bool = False
    format: str = ""

    @property
    def kind(self) -> str:
        kind = f"{self.name()}_{self.format}" if self.format else self.name()
        return f"{kind}_base_f32" if self.base_f32 else kind

    def flops(self, context: int) -> int:
        return 2 * self.in_features * self.vocab_size * (1 if self.base_x is None else 2)

    def check(self) -> None:
        if (self.base_x is None) != (self.base_weight is None):
            raise ValueError("Score: base_x and base_weight are given both or neither")
        if self.format not in ("", self.weight.format):
            raise ValueError(f"Score: format is {self.format!r}, expected that of the weight, {self.weight.format!r}")
        self._check_base()
        for x, weight in self.multiplied.items():
            if getattr(self, x) is not None:
                self._check_rows_of(x, getattr(self, weight).format)
        if self.scratch_width != scratch_width(self.vocab_size):
            expected = f"{scratch_width(self.vocab_size)} for {self.vocab_size} tokens"
            raise ValueError(f"Score: scratch_width is {self.scratch_width}, expected {expected}")

    def _check_base(self) -> None:
        format, base = self.weight.format, self.base_weight.format if self.base_weight else self.weight.format
        if base not in (format, "f32"):
            raise ValueError(f"Score: the base's head is {base}, expected f32 or {format} as the other")
        if self.base_f32 != (base != format):
            raise ValueError(f"Score: base_f32 is {self.base_f32} for a base's head in {base} beside one in {format}")

    def _check_rows_of(self, x: str, format: str) -> None:
        if format == CODES:
            check_codes(self, x, self.in_features)
            return
        check_rows(self, x, PREPARATION[format] if self.format else "", self.in_features)
        block = FORMATS[format].block_size if format in FORMATS else 1
        if self.in_features % block:
            raise ValueError(f"Score: in_features is {self.in_features}, expected a multiple of {block} for {format}")


def num_chunks(vocabulary: int) -> int:
    """The number of chunks of the vocabulary, each of which has sums of its own."""
    return -(-vocabulary // CHUNK)


def scratch_width(vocabulary: int) -> int:
    """Width of the output `scratch`, where the fast kernel keeps partial results."""
    return CHUNK_WORDS * num_chunks(vocabulary) + TARGET_WORDS


@definition
def scores(logits_V, base_V, target, out):
    """Writes the scores of a row. Without a base (base_V has no entry) columns 1 to 4 and 6 are 0.

    Columns, natural logarithms throughout:
      0 nll          -log p(target); 0 without a target (-1), NaN for one that is no token
      1 base_nll     the same of the base
      2 kl           sum of p0 * log(p0 / p), see `divergence`; it needs no target
      3 delta_p      p(target) - p0(target); 0 without a target
      4 same_top     1 where both have the same likeliest token, 0 where not
      5 top          the likeliest token, the first of equals; exact, since tokens are below 2**24
      6 base_top     that of the base
      7 top_logprob  log p(top)
    A row with a logit that is NaN or +inf has no softmax: what depends on it is NaN, never an ordinary number.
    Shapes: logits_V float32 [V]; base_V [V] or [0]; out float32 [8].
    Error: of a log-probability below 3e-6 + 1 ulp, as `sample.report`.
    Order: log p = (logit - largest) - log(sum), see `sample.log_normalizer`; p = exp(log p).
    """
    sound, largest, log_total = normalizer(logits_V)
    out[NLL], out[TOP] = nll(logits_V, target, sound, largest, log_total), likeliest(logits_V, sound)
    out[TOP_LOGPROB] = (largest - largest) - log_total if sound else UNKNOWN
    out[BASE_NLL], out[KL], out[DELTA_P], out[SAME_TOP], out[BASE_TOP] = ZERO, ZERO, ZERO, ZERO, ZERO
    if base_V.size == 0:
        return
    base_sound, base_largest, base_log_total = normalizer(base_V)
    out[BASE_NLL] = nll(base_V, target, base_sound, base_largest, base_log_total)
    out[BASE_TOP] = likeliest(base_V, base_sound)
    out[DELTA_P], out[SAME_TOP], out[KL] = UNKNOWN, UNKNOWN, UNKNOWN
    if sound and base_sound:
        out[DELTA_P] = difference(out[NLL], out[BASE_NLL], target)
        out[SAME_TOP] = ONE if out[TOP] == out[BASE_TOP] else ZERO
        mean = mean_difference(logits_V, base_V, base_largest)
        out[KL] = divergence(mean, largest, log_total, base_largest, base_log_total)


@definition
def normalizer(logits_V):
    """(Whether a row has a softmax, its largest logit, the logarithm of the sum of exp(logit - largest))."""
    if not is_sound(logits_V):
        return False, ZERO, ZERO
    largest, log_total = log_normalizer(logits_V)
    return True, largest, log_total


@definition
def likeliest(logits_V, sound):
    """The likeliest token, as a number of the output."""
    return float32(argmax(logits_V)) if sound else UNKNOWN


@definition
def nll(logits_V, target, sound, largest, log_total):
    """-log p(target) of a row."""
    logit = logits_V[target] if 0 <= target < logits_V.size else ZERO
    return nll_of(logit, target, logits_V.size, sound, largest, log_total)


@inlined
def nll_of(logit, target, V, sound, largest, log_total):
    """-log p(target), from the target's logit."""
    if not sound or target >= V or target < NO_TARGET:
        return UNKNOWN
    return log_total - (logit - largest) if target >= 0 else ZERO


@inlined
def difference(trial_nll, base_nll, target):
    """p(target) - p0(target); NaN where the target is no token."""
    if not (trial_nll == trial_nll and base_nll == base_nll):
        return UNKNOWN
    return exp(-trial_nll) - exp(-base_nll) if target >= 0 else ZERO


@definition
def mean_difference(logits_V, base_V, base_largest):
    """The sum of p0 * (l0 - l).

    Order: as `sample.log_normalizer` has it, by chunks of 4096: in each exp(l0 - its maximum) and that times (l0 - l),
      the latter by FMA, in 16 lanes and a tree; both sums times exp(its maximum - the largest of all), by FMA in
      ascending order; then one division.
    """
    total, cross = ZERO, ZERO
    weights, products = np.empty(16, np.float32), np.empty(16, np.float32)
    for first in range(0, base_V.size, CHUNK):
        base, trial = base_V[first : first + CHUNK], logits_V[first : first + CHUNK]
        top = maximum_of(base)
        weights[:], products[:] = ZERO, ZERO
        for i in range(base.size):
            weight = exp(base[i] - top)
            weights[i % 16] += weight
            products[i % 16] = fma(weight, base[i] - trial[i], products[i % 16])
        scale = exp(top - base_largest)
        total, cross = fma(tree_sum(weights), scale, total), fma(tree_sum(products), scale, cross)
    return cross / total


@inlined
def divergence(mean, largest, log_total, base_largest, base_log_total):
    """KL(base || the row) = sum of p0 * (l0 - l) - (log of the base's sum - log of the row's).

    Exactly 0 for equal logits; near 0 it may be negative by its error. NaN or inf where a logit is minus infinity.
    Error: below 1e-6, 3e-7 on average, for logits within 40 of each other and any vocabulary up to 151,936.
    Order: (mean - (largest0 - largest)) + (log(sum) - log(sum0)).
    """
    kl = (mean - (base_largest - largest)) + (log_total - base_log_total)
    return kl if kl == kl else UNKNOWN


@definition
def round_logits(logits_V, grid):
    """Rounds a row of logits to a grid [GRID_WORDS]; to NaN, if the grid's scale comes from the row."""
    kind = int(grid[KIND])
    if kind == ROW_SYMMETRIC or kind == ROW_ASYMMETRIC:
        logits_V[:] = UNKNOWN
    else:
        quantize_row(logits_V, grid)


@definition
def f32_logits(x_K, head, logits_V):
    """Writes a row's logits by a float32 head."""
    for n in range(logits_V.size):
        logits_V[n] = row_dot_f32(x_K, head, n, x_K.size)


@inlined
def code_row(row, K):
    """A row of codes as `row_dot_codes` takes it: codes less their zero point, and the scale."""
    return centered_row(row, K), tail_of(row, K)[0]


@inlined
def row_dot_codes(x, w, n, K):
    acc = code_dot(x[0], codes_at(w.codes, n, K), int64(peek(w.m + 4 * n, int32)))
    return scaled(acc, x[1], floats_at(w.d, n, 1)[0])


def _score(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = Score.read(op)
    V, K = a.vocab_size, a.in_features
    logits_V, base_V = np.empty(V, np.float32), np.empty(V if a.base_x else 0, np.float32)
    for t in range(thread, num_rows(op, step), num_threads):
        x = READ(a.x + ROW_BYTES(K) * t, K)
        for n in range(V):
            logits_V[n] = DOT(x, a.weight, n, K)
        if a.grid:
            round_logits(logits_V, carray(float_array(a.grid), (GRID_WORDS,)))
        if a.base_f32:
            f32_logits(floats_at(a.base_x, t, K), a.base_weight, base_V)
        elif a.base_x:
            x = READ(a.base_x + ROW_BYTES(K) * t, K)
            for n in range(V):
                base_V[n] = DOT(x, a.base_weight, n, K)
        out = carray(float_array(a.out + 4 * NUM_SCORES * t), (NUM_SCORES,))
        scores(logits_V, base_V, int64(peek(a.target + 4 * t, int32)), out)


def implementations(kernels: Mapping[str, Kernel], layouts: Mapping[str, Layout]) -> dict[str, Implementation]:
    """The table of score ops, from kernels and layouts by format; the base's head has the same format or is f32."""
    table = {
        f"score_{format}": Implementation(kernel, layouts[format], waits=True) for format, kernel in kernels.items()
    }
    for format in kernels.keys() - {"f32"}:
        base = {"base_weight": layouts["f32"]}
        with_f32 = Implementation(kernels[format], layouts[format], layouts=base, waits=True)
        table[f"score_{format}_base_f32"] = with_f32
    return table


_CODES = dict(READ=code_row, ROW_BYTES=code_bytes, DOT=row_dot_codes)
for _name, _constants in {**{name: constants(each) for name, each in PRODUCTS.items()}, CODES: _CODES}.items():
    globals()[f"_score_{_name}"] = variant(_score, f"_score_{_name}", **_constants)
_PRODUCT_OF = {**{name: format.product.name for name, format in FORMATS.items()}, CODES: CODES}
REFERENCE = implementations(
    {format: globals()[f"_score_{product}"] for format, product in _PRODUCT_OF.items()}, {**LAYOUTS, CODES: ROWS}
)
