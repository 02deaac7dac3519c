"""The ceilings that benchmarks measure are those of the arithmetic, not of what LLVM leaves of it."""

from lockstep.lab.ceiling import measure
from lockstep.runtime.threads import Team


def test_int8_is_no_faster_than_an_instruction_for_each_dot():
    """A register has four int8 for each float32. Where a dot is several instructions, LLVM could take all but the last
    out of the loop: 28 times the float32 ceiling."""
    team = Team(1)
    try:
        found = measure(team)
    finally:
        team.close()
    assert 0 < found.int8_per_second < 6 * found.f32_per_second
    assert found.bytes_per_second > 0
