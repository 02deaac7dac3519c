"""For every test of an op: random numbers that do not depend on which tests ran before."""

import zlib

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def numbers(request: pytest.FixtureRequest) -> None:
    """A module's RNG begins anew for each test, with a seed that is the test's name."""
    rng = getattr(request.module, "RNG", None)
    if isinstance(rng, np.random.Generator):
        rng.bit_generator.state = type(rng.bit_generator)(zlib.crc32(request.node.name.encode())).state
