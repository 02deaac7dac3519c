"""The self-check passes for right kernels, names the op of a wrong one, and checks every kind of op."""

import functools
import re

import pytest

from lockstep.engine.selfcheck import check as selfcheck
from lockstep.engine.selfcheck import golden
from lockstep.engine.selfcheck import ops as selfcheck_ops
from lockstep.engine.selfcheck import sampling as selfcheck_sampling
from lockstep.formats import BLOCK_FORMATS
from lockstep.native.host import UnfitMachine
from lockstep.ops import BACKENDS
from lockstep.ops.elementwise.add import Add
from lockstep.ops.rewrite import verifying
from lockstep.ops.sampling.adjust_logits import AdjustLogits
from lockstep.ops.sampling.sample import Sample
from lockstep.runtime.program import Program, Tensor
from tests.golden.record_kernels import recorded, recorded_ops, recorded_sampling
from tests.kernels import shared_kernels
from tests.models import tiny
from tests.models.cases import CASES as FAMILY_CASES
from tests.models.running import load as load_tiny
from tests.promise.faults import faulty, places
from tests.promise.models import CASES, Case, load

TABLE, RECORDED = {**BACKENDS["reference"], **BACKENDS["cpu"]}, golden.read()


@pytest.fixture(autouse=True)
def own_marks(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(shared_kernels(tmp_path / "cache")))


@pytest.fixture(
    scope="module",
    params=[Case("qwen3_5", "q8_0", "bf16"), Case("qwen2", "f32", "f32"), Case("qwen3", "q4_0", "q8")],
    ids=str,
)
def program(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny")).program


def test_sound_kernels_pass_and_are_remembered(program, tmp_path, monkeypatch):
    selfcheck.check(program, TABLE)
    assert len(list((tmp_path / "cache" / "selfcheck").iterdir())) == 1
    monkeypatch.setattr(selfcheck, "digests", lambda *_: pytest.fail("checked again"))
    selfcheck.check(program, TABLE)


def test_a_wrong_bit_in_any_kernel_is_refused_by_name(program):
    probe = selfcheck.probes(program)[0]  # there may be a second one, for the embedding's format
    made = selfcheck.probe_model(probe, TABLE, True).rewritten(None, True)
    for kind, _, word in places(made, lambda op: [t for checked, t in selfcheck.visible(made) if checked is op]):
        message = f"op {re.escape(kind)} gives other bits.*expected [0-9a-f]+, found"
        with pytest.raises(UnfitMachine, match=message):
            selfcheck.check(program, {**TABLE, kind: faulty(TABLE[kind], word)})
    for kind, _, word in places(made, lambda op: op.shared if isinstance(op, (AdjustLogits, Sample)) else ()):
        with pytest.raises(UnfitMachine, match=f"op {kind} gives other bits"):
            selfcheck.check(program, {**TABLE, kind: faulty(TABLE[kind], word)})
    for kind in {op.kind for op in made.ops if op.outputs[0].dtype == "i8"}:
        with pytest.raises(UnfitMachine, match="gives other bits"):
            selfcheck.check(program, {**TABLE, kind: faulty(TABLE[kind], 0)})


def test_an_op_without_a_recorded_digest_is_named(tmp_path, monkeypatch):
    op, probe = Add(**{k: Tensor(k, "T", 16) for k in ("out", "x", "y")}, width=16), selfcheck.Probe("a", "b", "c")
    message = r"op add has no recorded digest \(tensor out of probe .*\); `python -m tests.golden.record_kernels`"
    with pytest.raises(ValueError, match=message):
        selfcheck.compare("sampling", {"other": "0"}, [(op, "out", "0")])
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    monkeypatch.setattr(selfcheck, "probes", lambda program: [probe])
    monkeypatch.setattr(selfcheck, "digests", lambda *_, **__: [(op, "out", "0")])
    for recorded_ones in ({}, {str(probe): {}}):
        golden.write(recorded_ones, golden.PATH)
        with pytest.raises(ValueError, match=message):
            selfcheck.check(Program(), {})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_op_is_checked(case, tmp_path):
    plain = load(case, tmp_path).program
    for program in (plain, verifying(plain, 3)):
        made = [selfcheck.probe_model(p, TABLE, True).program for p in selfcheck.probes(program)]
        made += [selfcheck_ops.probe_model(p, TABLE, True).program for p in selfcheck_ops.probes(program)]
        assert kernels(program) <= set().union(*map(kernels, made))


def kernels(program):
    """The names of a program's kernels; a table that stays in its file is looked up by the kernel of other tables."""
    return {TABLE[op.kind].kernel.name for op in program.ops}


@pytest.mark.parametrize("family", selfcheck.CONFIGS)
@pytest.mark.parametrize("weights", ["q4_k", "f16"])
def test_a_family_in_a_format_has_probes_that_are_recorded(family, weights):
    """Rows that are not whole blocks have the format's fallback."""
    program = made_up(selfcheck.Probe(family, weights, "bf16"))
    probes = selfcheck.probes(program)
    assert f"linear_{weights}" in {op.kind for op in program.ops} and set(map(str, probes)) <= RECORDED.keys()
    assert kernels(program) <= set().union(*(kernels(made_up(probe)) for probe in probes))


@functools.cache
def made_up(probe):
    return selfcheck.probe_model(probe, TABLE, True).program


@pytest.mark.parametrize("name", ["llama_mlp_biased", "qwen3_yarn_biased"])
def test_biases_are_checked_in_every_family(name, tmp_path):
    config = FAMILY_CASES[name]
    program = load_tiny(tiny.write(tmp_path, config, tiny.tensors(config, 1))).program
    assert "add_bias" in {op.kind for op in program.ops}
    assert "qwen2" in {probe.family for probe in selfcheck.probes(program)}


@pytest.mark.parametrize("family", [selfcheck.DENSE, selfcheck.EXPERTS])
@pytest.mark.parametrize("weights", [name for name, made in BLOCK_FORMATS.items() if made.stored.encode is None])
def test_models_in_formats_of_gguf_files_can_be_checked(family, weights):
    probe = selfcheck.Probe(family, weights, "bf16")
    assert str(probe) in map(str, selfcheck.probes(made_up(probe)))
    selfcheck.check(made_up(probe), TABLE)


@pytest.mark.parametrize(
    "probe",
    [
        selfcheck_ops.DRAFTS,
        selfcheck_ops.INTEGERS,
        *map(selfcheck_ops.grouped_probe, ("q8_0", "q4_k", "bf16")),
        *map(selfcheck_ops.score_probe, ("f32", "codes")),
    ],
    ids=str,
)
def test_a_wrong_bit_in_an_op_that_no_made_up_model_has_is_refused(probe):
    made = selfcheck_ops.probe_model(probe, TABLE, True).program
    selfcheck.check(made, TABLE)
    written = places(made, lambda op: (*op.shared, *op.caches) if isinstance(op, probe.kinds) else ())
    assert len(written) == {"drafts": 6, "integers": 3, "score codes": 2}.get(probe.name, 1)
    for kind, _, word in written:
        said = rf"op {kind} gives other bits.*of probe {probe}: expected .*`--op {kind.removesuffix('_verify')}=ref"
        with pytest.raises(UnfitMachine, match=said):
            selfcheck.check(made, {**TABLE, kind: faulty(TABLE[kind], word)})


def test_block_diagonal_layers_of_every_format_have_a_probe():
    for format in selfcheck.FORMATS:
        made = selfcheck_ops.probe_model(selfcheck_ops.grouped_probe(format), TABLE, True).program
        assert f"grouped_linear_{format}" in {op.kind for op in made.ops}
        assert [str(probe) for probe in selfcheck_ops.probes(made)] == [f"grouped_linear {format}"]


def test_heads_of_every_format_have_a_probe():
    for format in selfcheck_ops.HEAD_FORMATS:
        made = selfcheck_ops.probe_model(selfcheck_ops.score_probe(format), TABLE, True).program
        kinds = {op.kind for op in made.ops if op.kind.startswith("score")}
        assert kinds == {f"score_{format}"} | ({f"score_{format}_base_f32"} if format != "f32" else set())
        assert f"score {format}" in [str(probe) for probe in selfcheck_ops.probes(made)]


def test_the_recorded_digests_are_those_of_the_definitions():
    for probe in (selfcheck.Probe("qwen2", "f32", "f32"), selfcheck.Probe("qwen3_5", "q8_0", "q8")):
        assert recorded(probe) == RECORDED[str(probe)]
    grouped, scored = selfcheck_ops.grouped_probe("q4_0"), selfcheck_ops.score_probe("q8_0")
    for probe in (selfcheck_ops.DRAFTS, selfcheck_ops.INTEGERS, grouped, scored):
        assert recorded_ops(probe) == RECORDED[str(probe)]
    assert recorded_sampling() == RECORDED[selfcheck_sampling.NAME]


def test_a_file_of_digests_is_read_as_it_was_written(tmp_path):
    digests = {"a f32": {"x": "1", "y": "2", "z": "3"}, "b": {"x": "4"}, "a q8_0": {"x": "5", "z": "6"}}
    golden.write(digests, tmp_path / "golden.json")
    assert golden.read(tmp_path / "golden.json") == digests
    golden.write(golden.read() | digests, tmp_path / "golden.json")  # probes are added, whatever was there
    assert golden.read(tmp_path / "golden.json") == RECORDED | digests
