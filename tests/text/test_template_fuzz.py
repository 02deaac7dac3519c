"""Random programs as chat templates: each renders a text or raises a ValueError, and this process is unharmed.

`make fuzz` runs them with fresh seeds."""

import random
import resource
from collections import Counter

import pytest

from lockstep.text.templates.chat_template import TemplateProcess
from tests.fuzz.templates import outcome, program


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("seed", range(2))
def test_random_templates(seed):
    process, rng, before = TemplateProcess(seconds=0.1), random.Random(seed), peak()
    seen = Counter(outcome(process, program(rng)) for _ in range(100))
    assert seen["text"] > 10 and seen["mistake"] > 10, seen
    assert peak() - before < 128 << 20
