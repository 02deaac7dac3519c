"""Answers with leaves, and their replays, for tests."""

from lockstep.engine.request import SamplingParams
from lockstep.receipts.replay import Replay, Replayed


def run(engine):
    """Runs an engine until nothing is left."""
    while engine.has_work:
        engine.step()


def answers(engine, prompts, params, **options):
    """Requests with leaves, run together; those of a prompt's samples follow one another."""
    requests = [engine.make(ids, p, receipt=True, **options) for ids, p in zip(prompts, params, strict=True)]
    for samples in requests:
        engine.queue(*samples)
    run(engine)
    return requests


def replayed(engine, request, params, sample=0, **changes):
    """What is replayed of a request."""
    known = dict(prompt_ids=request.prompt_ids, output_ids=request.output_ids, params=params, sample=sample)
    vocab_size = engine.model.config.vocab_size
    return Replayed(**known | dict(eos_ids=engine.eos_ids, vocab_size=vocab_size) | changes)


def replay(engine, head, of):
    """The Replay of what is replayed, at its end."""
    made = Replay(of, head)
    request = engine.make_reading(of.token_ids, made)
    engine.queue(request)
    run(engine)
    assert request.finish_reason == "embedded", request
    return made


KINDS = (
    SamplingParams(max_tokens=30, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=3, n=2),
    SamplingParams(max_tokens=20, temperature=1.1, top_k=40, min_p=0.01, seed=-5, prompt_logprobs=2, logprobs=3),
    SamplingParams(
        max_tokens=30,
        temperature=0.7,
        seed=1 << 40,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.1,
        min_tokens=5,
        logit_bias={7: 1.5, 9: -3.25},
        suppress_tokens=(11,),
    ),
    SamplingParams(max_tokens=1, prompt_logprobs=0),
)
