"""Kernels made of one body: each has its constants, and is found in the cache by another process."""

import subprocess
import sys

import numpy as np
import pytest

from lockstep.native.kernel import variant
from lockstep.native.simd import poke
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Tensor
from tests.ops.harness import run_op

FACTOR = None


class Write(Operands):
    """Writes a number times a factor."""

    out: Tensor = output("16")
    value: float


def body(op, step, thread, num_threads):
    a = Write.read(op)
    poke(a.out, a.value * FACTOR)


twice, thrice = variant(body, "twice", FACTOR=np.float32(2)), variant(body, "thrice", FACTOR=np.float32(3))
twins = [variant(body, "twin", FACTOR=np.float32(factor)) for factor in (4, 5)]


def written(kernel):
    return float(run_op(Implementation(kernel), Write, value=1.5)["out"][0, 0])


def test_each_variant_has_its_constant():
    assert (written(twice), written(thrice)) == (3.0, 4.5)
    assert twice.path == f"{__name__}:twice" and thrice.path == f"{__name__}:thrice"


def test_another_process_finds_them_in_the_cache():
    written(twice), written(thrice)
    code = (
        f"from {__name__} import thrice, twice\n"
        "for kernel in (twice, thrice):\n"
        "    kernel.address\n"
        "    assert kernel._compiled.cache_hits, kernel.name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_no_two_variants_have_one_name_in_the_cache(monkeypatch):
    with pytest.raises(ValueError, match=r"variant 'twice' of body: .*test_variants has this name already"):
        variant(body, "twice", FACTOR=np.float32(6))
    monkeypatch.setitem(globals(), "twin", twins[1])
    assert written(twins[1]) == 7.5
    with pytest.raises(ValueError, match=r"kernel .*test_variants:twin: it is cached under this name, but is not"):
        written(twins[0])


def test_a_misspelt_constant_is_refused():
    with pytest.raises(ValueError, match="variant 'new': body does not use 'FACTRO'; its global names are FACTOR, Wri"):
        variant(body, "new", FACTRO=np.float32(2))
