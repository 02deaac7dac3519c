"""Records engine/selfcheck/golden_kernels.json from the definitions: python -m tests.golden.record_kernels

Only after a decision to change bits, together with a new NUMERICS version.
"""

from lockstep.engine.selfcheck import golden
from lockstep.engine.selfcheck import ops as selfcheck_ops
from lockstep.engine.selfcheck import sampling as selfcheck_sampling
from lockstep.engine.selfcheck.check import CONFIGS, DENSE, EXPERTS, FORMAT_OF, FORMATS, Probe, digests
from lockstep.ops import BACKENDS
from lockstep.ops.attention.kv_cache import KV_DTYPES


def all_probes():
    """Every family in the formats that stand for all others, and two families in every format."""
    formats = {family: FORMATS if family in (DENSE, EXPERTS) else FORMAT_OF.values() for family in CONFIGS}
    return [Probe(f, w, kv) for f in CONFIGS for w in formats[f] for kv in KV_DTYPES]


def recorded(probe):
    """{tensor name: digest}, from the definitions, unfused."""
    return {name: digest for _, name, digest in digests(probe, BACKENDS["reference"], fused=False)}


def recorded_sampling():
    """{tensor name: digest} of the ops that choose tokens."""
    return {name: digest for _, name, digest in selfcheck_sampling.digests(BACKENDS["reference"])}


def recorded_ops(probe):
    """{tensor or cache name: digest} of ops that none of the random models has."""
    return {name: digest for _, name, digest in selfcheck_ops.digests(probe, BACKENDS["reference"], fused=False)}


if __name__ == "__main__":
    recording = {str(p): recorded(p) for p in all_probes()} | {selfcheck_sampling.NAME: recorded_sampling()}
    recording |= {str(p): recorded_ops(p) for p in selfcheck_ops.all_probes()}
    known = [name for name in golden.read() if name in recording]  # these keep their place
    golden.write({name: recording[name] for name in known} | recording)
