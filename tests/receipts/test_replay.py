"""A replay finds the leaves of an honest answer bit for bit, and the first token that was not the model's."""

import contextlib
import dataclasses
import random

import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.planned import planned
from lockstep.engine.request import SamplingParams
from lockstep.ptq.plan import Plan
from lockstep.receipts.head_blocks import HeadBlocks
from lockstep.receipts.merkle import leaf_hash
from lockstep.receipts.replay import TAG_BYTES
from lockstep.runtime.threads import Team
from tests.engine.test_planned import CONTENT, INTEGERS, RULES, solved
from tests.promise.models import Case, load
from tests.receipts.replays import KINDS, answers, replay, replayed
from tests.study.models import recorded

CASES = [
    Case("qwen3_5", "q8_0", "bf16"),
    Case("qwen3", "f32", "bf16"),
    Case("mistral_window", "q4_0", "q8"),
    Case("gemma3", "f32", "f32"),
    Case("qwen3_windows", "bf16", "bf16"),
    Case("bundled", "auto", "bf16"),
]
SIZES = (3, 70, 20, 130, 9)


def prompts(model, sizes=SIZES):
    """Random token ids."""
    draw = random.Random(4)
    return [[draw.randrange(model.config.vocab_size) for _ in range(size)] for size in sizes]


def check_honest(model, **options):
    """Checks that the answers of a crowd are replayed with their own leaves, on an engine with other sizes."""
    with contextlib.closing(Engine(model, EngineOptions(max_requests=6, threads=2, **options))) as engine:
        made = answers(engine, prompts(model), KINDS)
    assert [len(r.output_ids) for r in made[0]] == [30]
    with contextlib.closing(Engine(model, EngineOptions(max_requests=1, threads=1, max_step_tokens=48))) as engine:
        head = HeadBlocks(model, engine.runner)
        for samples, params in zip(made, KINDS, strict=True):
            for sample, request in enumerate(samples):
                found = replay(engine, head, replayed(engine, request, params, sample))
                assert found.mismatch is None
                assert (found.answer, found.prompt) == (request.leaves.answer, request.leaves.prompt)
                assert request.leaves.num_answer == len(request.output_ids)
                has_prompt = params.prompt_logprobs is not None
                assert request.leaves.num_prompt == (len(request.prompt_ids) - 1 if has_prompt else 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_crowd_is_replayed_one_by_one(case, tmp_path):
    check_honest(load(case, tmp_path))


@pytest.mark.parametrize("speculate", ["mtp", "lookup"])
def test_answers_with_drafts(speculate, tmp_path):
    check_honest(load(CASES[-1], tmp_path), speculate=speculate)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_answers_of_a_model_under_a_plan(arithmetic):
    model = recorded("plain")
    rules = INTEGERS if arithmetic == "integer" else RULES
    with contextlib.closing(Team(2)) as team:
        made = planned(model, solved(model, Plan(rules, arithmetic=arithmetic), team), CONTENT)
    check_honest(made)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = load(CASES[-1], tmp_path_factory.mktemp("model"))
    with contextlib.closing(Engine(model, EngineOptions(max_requests=4, threads=1))) as made:
        yield made


@pytest.fixture(scope="module")
def head(engine):
    return HeadBlocks(engine.model, engine.runner)


def test_the_first_wrong_token_is_found(engine, head):
    params = KINDS[0]
    [[request]] = answers(engine, [[5, 6, 7]], [params])
    for number in (0, 13, 29):
        wrong = list(request.output_ids)
        wrong[number] = (wrong[number] + 1) % engine.model.config.vocab_size
        found = replay(engine, head, replayed(engine, request, params, output_ids=wrong)).mismatch
        assert (found.what, found.position, found.claimed, found.found) == (
            "token",
            number,
            wrong[number],
            request.output_ids[number],
        )


def test_tags_tell_the_first_wrong_leaf(engine, head):
    params = KINDS[1]
    request = answers(engine, [[5, 6, 7]], [params])[0][1]
    leaves = [bytes(request.leaves.answer[i : i + 40]) for i in range(0, len(request.leaves.answer), 40)]
    tags = b"".join(leaf_hash(each)[:TAG_BYTES] for each in leaves)
    assert replay(engine, head, replayed(engine, request, params, 1, tags=tags)).mismatch is None
    wrong = bytearray(tags)
    wrong[17 * TAG_BYTES] ^= 1
    found = replay(engine, head, replayed(engine, request, params, 1, tags=bytes(wrong))).mismatch
    assert (found.what, found.position) == ("leaf", 17)
    assert found.found == tags[17 * TAG_BYTES :][:TAG_BYTES].hex() != found.claimed


def test_a_long_answer_is_replayed_in_blocks_and_a_sample_by_its_own_seed(engine, head):
    params = SamplingParams(max_tokens=300, temperature=1.0, seed=9, n=2, ignore_eos=True, presence_penalty=0.5)
    first, second = answers(engine, prompts(engine.model, [90]), [params])[0]
    for sample, request in enumerate((first, second)):
        found = replay(engine, head, replayed(engine, request, params, sample))
        assert found.mismatch is None and found.answer == request.leaves.answer
    assert replay(engine, head, replayed(engine, second, params, 0)).mismatch.what == "token"


def test_an_answer_that_goes_on_has_the_leaves_of_the_whole(engine):
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=2, ignore_eos=True, frequency_penalty=0.5)
    [[whole]] = answers(engine, [[8, 9]], [params])
    [[resumed]] = answers(engine, [[8, 9]], [params], output_ids=whole.output_ids[:17], recompute_logprobs=False)
    assert resumed.num_given == 17 and resumed.leaves.answer == whole.leaves.answer


def test_a_mask_that_cannot_read_the_answer_is_named(engine, head):
    def mask(output_ids):
        if len(output_ids) == 20:
            raise ValueError("no further")

    params = KINDS[0]
    [[request]] = answers(engine, [[5, 6, 7]], [params])
    masked = dataclasses.replace(params, logits_mask=mask)
    found = replay(engine, head, replayed(engine, request, masked))
    assert (found.mismatch.what, found.mismatch.position, found.mismatch.reason) == ("form", 20, "no further")
    assert found.answer == request.leaves.answer[: 20 * 40]
