"""No bits come from libm, whose last bits change from system to system, nor from libraries that sum in orders of their
own: by the names that the package's source uses.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

import lockstep

PACKAGE = pathlib.Path(lockstep.__file__).parent
# exact or rounded correctly by IEEE-754, or of integers
EXACT = set(
    "ceil copysign factorial floor frexp fsum inf isfinite isnan ldexp nan nextafter pi prod sqrt trunc".split()
)
# of NumPy and of random generators: elementary functions, BLAS and LAPACK, distributions that are made by them
INEXACT = set(
    "exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 power float_power pow cbrt hypot sin cos tan sinc arcsin"
    " arccos arctan arctan2 sinh cosh tanh arcsinh arccosh arctanh i0 dot vdot inner matmul tensordot einsum convolve"
    " correlate corrcoef cov polyfit geomspace logspace linalg fft normal standard_normal exponential lognormal gamma"
    " beta gauss normalvariate expovariate lognormvariate".split()
)
MODULES = {"numpy", "np", "random", "rng", "generator"}
OTHERS = {"cmath", "scipy"}
# what is allowed, by file: how often, and why no bits depend on it
ALLOWED = {
    "lab/layer_speed.py": (2, "weights and rows of which the time is measured"),
    "lab/load.py": (1, "the moments at which requests arrive"),
    "lab/speculation.py": (1, "how many drafts to expect, printed beside what was measured"),
    "engine/speculation/drafts.py": (1, "how many drafts are tried, on which only the time depends"),
    "native/simd/math.py": (1, "2 to a whole number is exact; only in the uncompiled form of pow2"),
}


def inexact(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a source, and the names or powers there whose results depend on the system."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_inexact(ast.unparse(node.value), node.attr):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [a.name for a in node.names if is_inexact(node.module, a.name)]
            yield from ((node.lineno, f"{node.module}.{name}") for name in found)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] in OTHERS)
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Pow | ast.MatMult):
            if not is_exact_power(node):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pow":
            yield node.lineno, ast.unparse(node)


def is_inexact(module: str, name: str) -> bool:
    if module == "math":
        return name not in EXACT
    root = module.partition(".")[0]
    return root in OTHERS or (name in INEXACT and (root in MODULES or "random" in module))


def is_exact_power(node: ast.AST) -> bool:
    """Whether it is a power of a power of two or of -1, or of whole numbers that are written there or lengths."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Pow):
        return False
    base = ast.unparse(node.left)
    is_whole = isinstance(node.right, ast.Constant) and isinstance(node.right.value, int)
    return base in ("2", "2.0", "-1.0") or (is_whole and (base == "10" or base.startswith("len(") or base.isupper()))


def test_no_bits_come_from_libm():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = list(inexact(path.read_text()))
        name = path.relative_to(PACKAGE).as_posix()
        if len(lines) != ALLOWED.get(name, (0,))[0]:
            found[name] = lines
    assert not found, "use ops/math.py, weights/decimals.py or math.sqrt; or say here why no bits depend on it"


SEEN = """
math.log(x)|math.exp(x)|math.pow(x, 2)|math.dist(x, y)|np.exp(x)|np.log1p(x)|np.linalg.norm(x)|rng.standard_normal(3)
np.random.default_rng(1).normal(0, 1)|random.gauss(0, 1)|x ** 0.5|x ** y|3.0 ** x|x **= 0.5|pow(x, y)|x @ y
from math import log|from numpy import tanh|import scipy|import cmath|from scipy.special import erf
"""


@pytest.mark.parametrize("source", SEEN.strip().replace("\n", "|").split("|"))
def test_what_depends_on_the_system_is_seen(source):
    assert len(list(inexact(source))) == 1


@pytest.mark.parametrize("source", ["math.sqrt(x)", "2.0**-9", "10**9", "len(x) ** 2", "math.fsum(x)", "np.sqrt(x)"])
def test_what_is_exact_is_allowed(source):
    assert not list(inexact(source))
