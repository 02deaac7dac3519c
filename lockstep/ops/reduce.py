"""The fixed order in which sixteen virtual lanes become one number."""

from lockstep.runtime.kernel import inlined


@inlined
def tree_sum(lane):
    """Sum of 16 float32: each pair 8 apart, then 4, 2, 1. The same tree as `simd.sum_lanes`."""
    width = 8
    while width >= 1:
        for i in range(width):
            lane[i] = lane[i] + lane[i + width]
        width //= 2
    return lane[0]
