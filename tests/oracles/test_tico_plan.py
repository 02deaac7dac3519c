"""Live comparison with TICO 0.3.0: a random Llama model under one plan, in both TICO profiles and both of our twins.

The seed is fixed: two float32 programs that add in different orders may round a number to adjacent codes, and how often
this happens, and with what effect, depends on the numbers. LOCKSTEP_SEED sets another seed.
"""

import copy
import json
import os
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from lockstep.ptq.parts import ScaledTensor, fold_part
from lockstep.ptq.plan import Plan
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import sites_for
from lockstep.runtime.threads import Team
from lockstep.study.scoring.evaluate import TWINS, Setup, rig_for, solve
from lockstep.study.scoring.subject import Subject, load_subject, treatment_for
from lockstep.study.scoring.text import Window
from lockstep.study.tico import qparams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tico = pytest.importorskip("tico.quantization", reason="TICO 0.3.0 is needed")
builders = pytest.importorskip("tico.quantization.config.builders")
affine = pytest.importorskip("tico.quantization.config.specs").affine
DType = pytest.importorskip("tico.quantization.wrapq.dtypes").DType

SEED = int(os.environ.get("LOCKSTEP_SEED") or 0)
LAYERS, HIDDEN, FFN, VOCABULARY, LENGTH = 2, 64, 160, 96, 32
ACTS = {"i16": DType.int(16), "u8": DType.uint(8)}
PROFILES = {  # of TICO: the rotation, and which weights hold attention's scale; its two layouts are our twins
    "npu_export": dict(rope="pre_negated", fuse_scale="k"),
    "reference_eval": dict(rope="hf", fuse_scale="none"),
}
# Observers of TICO that see nothing without a cache. Ours have the grids of the same numbers at other sites.
UNSEEN = ("self_attn.new_k", "self_attn.new_v", "self_attn.past_key", "self_attn.past_value")
# Weights and embeddings: these numbers are observed before any arithmetic.
SAME = (".weight", "embed_tokens.act_out", "layers.0.input_layernorm.act_in")
# Float32 rounds each addition by at most 2^-24 of its result. The longest chain to a number has 7 sums per layer and
# the sum of the head, each of at most FFN numbers; roundings go up as often as down, and two programs are compared.
RANGE_ERROR = 2 * np.sqrt((7 * LAYERS + 1) * FFN) * 2.0**-24
# A rescaled grid: TICO multiplies both ends of a row, then subtracts and divides; we subtract, divide and multiply.
RESCALED_ERROR = 6 * 2.0**-24
NUM_NUDGES = 16


@dataclass
class Case:
    """One plan on both sides.

    theirs: TICO's model, calibrated by TICO. fresh: the same, not calibrated. plan, subject, solved: ours. qparams:
    ours, from JSON. logits: TICO's, of the first window. code: the step between two codes of logits. ours:
    log-probabilities of all tokens, by twin.
    """

    theirs: object
    fresh: object
    plan: Plan
    subject: Subject
    solved: Solved
    windows: torch.Tensor
    qparams: dict
    logits: np.ndarray
    code: float
    ours: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # so that attention's scale is no power of two
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        initializer_range=0.15,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, load_subject(str(folder), LENGTH, "f32"), torch.randint(0, VOCABULARY, (2, 1, LENGTH))


CASES = [(act, bits, profile, {}) for act, bits in (("i16", 4), ("u8", 8)) for profile in PROFILES]
CASES.append(("u8", 8, "reference_eval", dict(fuse_scale="q")))


@pytest.fixture(scope="module", params=CASES, ids=lambda p: "-".join([f"w{p[1]}a{p[0]}", p[2], *p[3].values()]))
def case(request, llama):
    (act, bits, profile, changes), (model, subject, windows) = request.param, llama
    with torch.no_grad(), closing(Team(1)) as team:
        theirs = prepared(model, act, bits, profile, changes)
        for ids in windows:
            theirs(ids, use_cache=False)
        theirs = tico.convert(theirs).eval()
        plan = plan_of(act, bits, **PROFILES[profile] | changes)
        solved = solve(subject, plan, team, texts_of(windows))
        made = Case(
            theirs,
            prepared(model, act, bits, profile, changes),
            plan,
            subject,
            solved,
            windows,
            json.loads(json.dumps(qparams(solved, subject.model))),
            logits_of(theirs, windows),
            float(theirs.get_observer("lm_head.act_out").compute_qparams()[0]),
        )
        made.ours = {twin: our_logprobs(subject, solved, team, texts_of(windows)[0], twin) for twin in TWINS}
    return made


def texts_of(windows):
    return [Window(tuple(ids[0].tolist()), (-1,) * LENGTH) for ids in windows]


def prepared(model, act, bits, profile, changes):
    """The model with TICO's wrappers."""
    config = builders.build_llm_ptq_config(
        model_type="llama",
        num_hidden_layers=LAYERS,
        activation=affine(ACTS[act]),
        linear_weight=affine(DType.uint(bits)),
        embedding_weight=affine(DType.uint(8)),
        lm_head_weight=affine(DType.uint(8)),
        profile=profile,
    )
    if changes:
        config.model_args["attention"] = {"scale_fusion": f"{changes['fuse_scale']}_proj"}
    return tico.prepare(copy.deepcopy(model), config)


def plan_of(act, bits, **options):
    """The plan that equals TICO's settings."""
    rules = [["*", act], ["*.w", f"u{bits}/row"], ["embed.w", "u8/row"], ["head.w", "u8/row"]]
    return Plan([*rules, ["*norm*.w", "i16/tensor"], ["L*.res.attn", "off"]], mask="additive", **options)


def logits_of(model, windows):
    """TICO's logits of the first window."""
    with torch.no_grad():
        return model(windows[0], use_cache=False).logits[0].numpy()


def logprobs(logits):
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def our_logprobs(subject, solved, team, window, twin):
    """Log-probabilities of all tokens at every position, by scoring every token as the next one."""
    program, plan = subject.model.recorded, solved.plan
    specs = plan.resolve(sites_for(program, plan))
    rig = rig_for(subject, treatment_for(program, plan, [specs], LENGTH), team, LENGTH, twin)
    Setup(specs, solved.grids).put_on(rig)
    made, base = np.empty((LENGTH, VOCABULARY), np.float32), np.zeros((LENGTH, HIDDEN), np.float32)
    for token in range(VOCABULARY):
        rig.load(window.ids, [token] * LENGTH, base)
        rig.run(rig.score_index if token else 0)
        made[:, token] = -rig.scores()[:, 0]
    return made


def scale_differences(case, ours):
    """For every observer that saw numbers: (name, largest relative difference of our scales to TICO's)."""
    for name, observer in case.theirs.named_observers():
        if torch.isfinite(observer.min_val).all():
            scale = observer.compute_qparams()[0].double().numpy()
            yield name, np.abs(np.float32(ours[name]["scale"]) / scale - 1).max()


def tolerance(case):
    """How far logits of two float32 programs of one plan may be apart: (largest difference, root mean square).

    One code of logits, plus twice the largest change of TICO's own logits when each of its scales moves by up to twice
    its difference to ours: numbers between two codes then jump, as they do when sums are added in another order.
    """
    differences, rng = dict(scale_differences(case, case.qparams)), np.random.default_rng(SEED)
    model, moved = copy.deepcopy(case.theirs), []
    kept = {name: observer.compute_qparams() for name, observer in model.named_observers()}
    for _ in range(NUM_NUDGES):
        for name, observer in model.named_observers():
            scale, zero = kept[name]
            factor = 1 + 2 * differences.get(name, 0) * rng.uniform(-1, 1)
            observer.load_qparams((scale.double() * factor).float(), zero, lock=True)
        moved.append(logits_of(model, case.windows) - case.logits)
    return case.code + 2 * np.abs(moved).max(), case.code / 10 + 2 * max(map(rms, moved))


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


# ------------------------------------------------------------ tests


def allowed(case, name):
    """The largest allowed relative difference of a scale."""
    if name.endswith(f".{case.plan.fuse_scale}_proj.weight"):
        return RESCALED_ERROR
    return 0 if name.endswith(SAME) else RANGE_ERROR


def check_numbers(case, ours):
    observers, differences = dict(case.theirs.named_observers()), dict(scale_differences(case, ours))
    assert observers.keys() == ours.keys()
    assert all(name.endswith(UNSEEN) for name in observers.keys() - differences.keys())
    for name, difference in differences.items():
        assert difference <= allowed(case, name), name
        zero = observers[name].compute_qparams()[1].numpy()
        np.testing.assert_array_equal(ours[name]["zero_point"], zero, name)


def test_every_observer_has_our_scale_and_zero_point(case):
    check_numbers(case, case.qparams)


def test_a_scale_in_another_place_is_seen(case, monkeypatch):
    """Attention's scale in the other weight of q and k, or in a weight's grid twice or not at all."""
    with closing(Team(1)) as team:
        for into in {"q", "k"} - {case.plan.fuse_scale}:
            other = solve(case.subject, replace(case.plan, fuse_scale=into), team, texts_of(case.windows))
            with pytest.raises((AssertionError, KeyError)):
                check_numbers(case, qparams(other, case.subject.model))
    for power in (0, 2) if case.plan.fuse_scale != "none" else ():
        wrong = lambda part, spec, n=power: fold_part(to_the(part, n), spec)
        monkeypatch.setattr("lockstep.study.tico.fold_part", wrong)
        with pytest.raises(AssertionError, match=r"_proj\.weight"):
            check_numbers(case, qparams(case.solved, case.subject.model))


def to_the(part, power):
    """A part whose factor is taken to a power."""
    return replace(part, factor=part.factor**power) if isinstance(part, ScaledTensor) else part


def test_logits_are_those_of_both_twins(case):
    """Compares log-probabilities: their log-sum-exp moves by no more than the logits, so twice as much is allowed."""
    assert case.ours[TWINS[0]].tobytes() == case.ours[TWINS[1]].tobytes()
    apart, (most, mean) = case.ours[TWINS[0]] - logprobs(case.logits), tolerance(case)
    assert np.abs(apart).max() <= 2 * most
    assert rms(apart) <= 2 * mean


def test_tico_takes_our_numbers_in_place_of_a_calibration(case):
    for name, numbers in case.qparams.items():
        scale, zero = torch.tensor(numbers["scale"]), torch.tensor(numbers["zero_point"])
        case.fresh.get_observer(name).load_qparams(scale, zero, lock=True)
    apart, (most, mean) = logits_of(tico.convert(case.fresh).eval(), case.windows) - case.logits, tolerance(case)
    assert np.abs(apart).max() <= most
    assert rms(apart) <= mean
