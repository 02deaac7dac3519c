"""The reference answer to a prompt: the request runs alone, one token a step, on one thread, with nothing cached."""

from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.runtime.threads import Team
from tests.promise.trace import state_digest, whole


@dataclass(frozen=True)
class Answer:
    """known: token ids of prompt and answer [n + m]. logits [m, V], logprobs [m]: of each answer token. states: digest
    of the recurrent state after each computed token. cache: {name of a cache: bytes of every computed position}."""

    known: list
    num_prompt: int
    logits: np.ndarray
    logprobs: np.ndarray
    states: list
    cache: dict


def sampling(params, position):
    """Fields of the SAMPLING_RECORD that chooses the token at a position."""
    return dict(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k,
        seed=params.seed,
        position=position,
    )


def answer(model, prompt, params):
    """Runs a prompt to its max_tokens (end tokens are ignored)."""
    known, rows, states = list(prompt), [], []
    pages = everywhere(range(pages_for(len(prompt) + params.max_tokens)))
    team = Team(1)
    try:
        runner = Runner(model, team, Limits(1, 1, pages[0].end, 1))
        for p in range(len(prompt) + params.max_tokens - 1):
            sampled = {0: sampling(params, p + 1)} if p >= len(prompt) - 1 else {}
            tokens, logprobs, logits = runner.step([Span([known[p]], p, pages, 0, sampled)])
            if sampled:
                known.append(int(tokens[0]))
                rows.append((logits[0].copy(), logprobs[0]))
            states.append(state_digest(runner, 0))
        logits, logprobs = (np.array(column) for column in zip(*rows, strict=True))
        return Answer(known, len(prompt), logits, logprobs, states, whole(runner, pages, len(states)))
    finally:
        team.close()
