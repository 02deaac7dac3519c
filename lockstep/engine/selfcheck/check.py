"""Self-check: before an engine starts, each of its kernels must give on this CPU the bits that its definition gave when
they were recorded.

Tiny made-up models with the same kinds of op run three steps; a digest of every activation is compared with digests
recorded from the definitions (`golden.py`). Rows of quantized or bf16 activations have no digest of their own, since
their layout depends on the target; the products that are computed from them have one.

Only embeddings, linear layers and experts know the format of their weights; other ops know how rows are prepared for
them. So every family is tried in one format for each preparation, and every format in one family.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.model import emit_sampling
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.selfcheck import golden
from lockstep.engine.selfcheck import ops as selfcheck_ops
from lockstep.engine.selfcheck import sampling as selfcheck_sampling
from lockstep.engine.selfcheck.sampling import ProbeModel
from lockstep.engine.selfcheck.weights import stored
from lockstep.formats import FORMATS
from lockstep.models.recording import record_on
from lockstep.models.registry import FAMILIES
from lockstep.models.shapes import AnyTensor
from lockstep.models.tiny import CONTEXT, VOCABULARY
from lockstep.native.host import UnfitMachine
from lockstep.native.kernel import fingerprint, target
from lockstep.native.numbers import versions
from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.linear.experts import ExpertLinear
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rewrite import RECORDED_KINDS, fuse, fuse_expert_biases, lower
from lockstep.runtime.threads import Team
from lockstep.user_cache import cache_subfolder, keeping, user_cache

NUMERICS = 5  # version of the arithmetic: any change of any bit raises it
# the numbers of tokens of two requests in each step: the end of a page, tiles that are not full, decode beside prefill
STEPS = ((61, 3), (5, 1), (1, 1))
UNUSUAL = {"factor": 1.0, "whole_norms": False}  # parameters with ways of their own, and what most models have
CONFIGS = {name: family.tiny for name, family in FAMILIES.items() if family.tiny}
FORMAT_OF = {"": "f32", "quantize_q8": "q8_0", "round_bf16": "bf16"}  # in which families are tried, by preparation
DENSE, EXPERTS = "qwen3", "qwen3_moe"  # the families that are tried in every format: the latter with experts


@dataclass(frozen=True)
class Probe:
    """A made-up model: the name of its family, its weight format and its KV format."""

    family: str
    weights: str
    kv_dtype: str

    def __str__(self):
        return f"{self.family} {self.weights} kv {self.kv_dtype}"


def probes(program):
    """The probes that together run every kernel of a program, for each format of its cache. An embedding in a format
    that no linear layer has needs one more probe."""
    formats = {weight.format for op in program.ops if isinstance(op, (Linear, ExpertLinear)) for weight in op.packed}
    tables = {op.table.format for op in program.ops if isinstance(op, Embed)} - formats
    kv = sorted({op.kv_dtype for op in program.ops if isinstance(op, AttentionInputs)})
    home = EXPERTS if any(isinstance(op, ExpertLinear) for op in program.ops) else DENSE
    families, plain = families_of(program), {FORMAT_OF[FORMATS[w].preparation] for w in formats}
    tried = dict.fromkeys(families, plain) | {home: formats if home in families else formats - plain}
    of_layers = [Probe(f, w, k) for f in tried for w in FORMATS if w in tried[f] for k in kv]
    return of_layers + [Probe(home, w, kv[0]) for w in FORMATS if w in tables and kv]


def families_of(program):
    """Names of families that together have all forms of a program: each time the family with the most missing forms,
    and among equals with the fewest others."""
    tiny = {name: tiny_forms(name) for name in CONFIGS}
    missing, families = forms(program) & set().union(*tiny.values()), []
    while missing:
        families.append(max(tiny, key=lambda name: (len(missing & tiny[name]), -len(tiny[name]))))
        missing -= tiny[families[-1]]
    return families


def forms(program):
    """The forms of a program's ops, in which families differ: (declaration, activation, optional operands).

    Parameters of UNUSUAL count as operands. Residuals do not count, since fusing adds them. An op that `verifying` puts
    in the place of another counts as that one.
    """
    return {(_recorded(type(op)), getattr(op, "activation", ""), frozenset(_optional(op))) for op in program.ops}


def _recorded(declaration):
    return declaration.__base__ if declaration.name() in RECORDED_KINDS else declaration


def _optional(op):
    unusual = {name for name, usual in UNUSUAL.items() if getattr(op, name, usual) != usual}
    given = {name for name, o in op.declared() if o.optional and getattr(op, name) is not None}
    return unusual | (given - {"residual"})


@functools.cache
def tiny_forms(name):
    """The forms of a family's tiny model, with its experts' biases fused and not."""
    program = tiny_program(name, AnyTensor(max_context=CONTEXT))
    return forms(program) | forms(fuse_expert_biases(program))


# ---------------------------------------------------------------- the made-up model


def tiny_program(family, ops):
    """The program of a family's tiny model on a Recorder, sampling included."""
    config = FAMILIES[family].read(CONFIGS[family])
    program, logits = record_on(ops, config)
    emit_sampling(program, logits, config.vocab_size)
    return program


def probe_model(probe, table, fused):
    """The model of a probe, for a Runner."""
    made_up = AnyTensor(lambda name, shape: stored(name, shape, probe.weights), probe.kv_dtype, CONTEXT)
    lowered = lower(tiny_program(probe.family, made_up))
    return ProbeModel(table, fuse(lowered, table) if fused else lowered, CONTEXT)


# ---------------------------------------------------------------- digests


def digests(probe, table, fused=True):
    """[(op, tensor name, digest)] of what each op of a probe's program writes, in order."""
    with contextlib.closing(Team(1)) as team:
        runner = Runner(probe_model(probe, table, fused), team, Limits(64, 2, 4, 3), keep=True)
        hashes, at = {}, [0, 0]
        for counts in STEPS:
            runner.step([span(i, start, n) for i, (start, n) in enumerate(zip(at, counts, strict=True))])
            at = [start + n for start, n in zip(at, counts, strict=True)]
            for op, tensor in visible(runner.program):
                rows = {"T": sum(counts), "O": sum(counts), "R": 3 if counts[0] > 1 else 2, "S": 2}[tensor.rows]
                width = VOCABULARY if tensor.name == "logits" else tensor.width
                hashes.setdefault((op, tensor.name), hashlib.sha256()).update(
                    np.ascontiguousarray(runner.executor.view(tensor, rows)[:, :width]).tobytes()
                )
        return [(op, name, digest.hexdigest()[:16]) for (op, name), digest in hashes.items()]


def span(index, start, num_tokens):
    """The Span of a probe's request number `index`, on pages in descending order. Request 0 also samples its first row.

    All rows are embedded, so that the ops after the last mixing of tokens see as many rows as those before.
    """
    ids = [(7 * i * i + 13 * index + 3) % VOCABULARY for i in range(start, start + num_tokens)]
    rows = sorted({0, num_tokens - 1}) if index == 0 else [num_tokens - 1]
    params = [
        dict(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01),
        dict(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0),
    ]
    sampled = {row: dict(params[(row + index) % 2], seed=index, position=start + row + 1) for row in rows}
    return Span(ids, start, everywhere([3 - 2 * index, 2 - 2 * index]), index, sampled, range(num_tokens))


def visible(program):
    """(op, tensor) for every output whose bytes are the same on all targets.

    Left out are scratch that only its own kernel reads, outputs that are written only for rows that ask for them (see
    selfcheck/sampling.py), and embedded rows, for which the kernels of sampled rows run.
    """
    return [(op, t) for op in program.ops for t in op.kept if t.dtype != "i8" and t.rows != "E"]


# ---------------------------------------------------------------- the check


def check(program, backend):
    """Runs the probes of a program on an op table. UnfitMachine at the first op whose bits differ from the recorded
    ones; ValueError at the first op without a recorded digest.

    A check that passed is remembered in the user's cache folder, until sources, versions or the CPU change.
    """
    wanted, others, mark = *probes_of(program), mark_of(program, backend)
    if os.path.exists(mark):
        with contextlib.suppress(OSError):
            mark.touch()  # it is used: `lockstep cache prune --older-than` leaves it
        return
    recorded = golden.read(golden.PATH)
    for probe in wanted:
        compare(probe, recorded.get(str(probe), {}), digests(probe, backend))
    for other in others:
        compare(other, recorded.get(str(other), {}), selfcheck_ops.digests(other, backend))
    sampling = selfcheck_sampling.digests(backend)
    compare(selfcheck_sampling.NAME, recorded.get(selfcheck_sampling.NAME, {}), sampling)
    with keeping("The outcome of the self-check (some bytes)", mark.parent):
        (cache_subfolder("selfcheck") / mark.name).touch()


def probes_of(program):
    """(Probes, OpProbes) that together run every kind of op of a program."""
    return probes(program), selfcheck_ops.probes(program)


def mark_of(program, backend):
    """The file that is there once the check of a program on an op table has passed."""
    wanted, others = probes_of(program)
    kernels = [backend[kind].kernel for kind in {op.kind for op in program.ops}]
    marks = user_cache() / "selfcheck"
    with contextlib.suppress(OSError):  # where nothing can be written, each start checks
        marks = cache_subfolder("selfcheck")
    return marks / identity([*wanted, *others], kernels)


def programs(program, backend):
    """The programs that `check` will run; none if the check has passed before."""
    if os.path.exists(mark_of(program, backend)):
        return []
    wanted, others = probes_of(program)
    models = [probe_model(probe, backend, True) for probe in wanted]
    models += [selfcheck_ops.probe_model(probe, backend, True) for probe in others]
    return [model.program for model in (*models, selfcheck_sampling.probe_model(backend))]


def compare(probe, recorded, digests):
    """UnfitMachine for the first digest that differs from the recorded one, ValueError if none is recorded."""
    for op, name, digest in digests:
        if name not in recorded:
            raise ValueError(
                f"self-check: op {op.kind} has no recorded digest (tensor {name} of probe {probe}); "
                f"`python -m tests.golden.record_kernels` records what its definition gives"
            )
        if recorded[name] != digest:
            compilers = ", ".join(f"{name} {version}" for name, version in versions().items())
            swap = f"--op {RECORDED_KINDS.get(op.kind, op.kind)}=reference"
            raise UnfitMachine(
                f"self-check failed: op {op.kind} gives other bits on this machine than its definition (tensor {name} "
                f"of probe {probe}: expected {recorded[name]}, found {digest}; CPU {cpu()}, target {target()[1]}, "
                f"numerics {NUMERICS}, {compilers}). Nothing it "
                f"computes can be trusted; please report this. `{swap}` runs the definition instead."
            )


def identity(wanted, kernels):
    """A hash of everything on which the outcome of a check depends."""
    sources = sorted((module, fingerprint(module)) for module in {k.function.__module__ for k in kernels})
    names = sorted(k.name for k in kernels)
    files = golden.PATH.read_bytes(), pathlib.Path(__file__).read_bytes()
    known = NUMERICS, cpu(), [str(p) for p in wanted], names, sources, *files
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def cpu():
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
