"""What a fleet is made of: routing, planned starts, updates taken in by their index."""

import hashlib

import pytest

from lockstep.engine.request import Request, SamplingParams
from lockstep.replicas.messages import NameChanges
from lockstep.replicas.replacements import Replacements
from lockstep.replicas.router import KnownBlocks, choose, usable_names
from lockstep.replicas.updates import Differing, Sent, known_answer, take


class Place:
    """A replica as the router sees it."""

    def __init__(self, number, load=0):
        self.number, self.load, self.blocks = number, load, KnownBlocks()


def names(count, text="a"):
    return [hashlib.sha256(f"{text}{i}".encode()).digest() for i in range(count)]


def known(place, pages, states=()):
    place.blocks.take(NameChanges([(name, True) for name in pages], [(name, True) for name in states]))


def test_a_prompt_goes_where_most_of_it_is_known():
    places, prompt = [Place(0), Place(1), Place(2)], names(4)
    known(places[1], prompt[:3])
    known(places[2], [*prompt[:1], prompt[3]])  # a block after a gap is of no use
    assert choose(places, prompt, has_states=False) is places[1]
    assert [place.blocks.num_known(prompt, has_states=False) for place in places] == [0, 192, 64]
    places[1].blocks.take(NameChanges([(prompt[0], False)], []))
    assert choose(places, prompt, has_states=False) is places[2]


def test_what_is_known_weighs_three_times_what_waits():
    places, prompt = [Place(0), Place(1, load=3 * 128)], names(4)
    known(places[1], prompt[:2])
    assert choose(places, prompt, has_states=False) is places[0]
    known(places[1], prompt[2:3])
    assert choose(places, prompt, has_states=False) is places[1]


def test_a_model_with_states_goes_on_where_a_state_is_kept():
    place, prompt = Place(0), names(4)
    known(place, prompt, states=[prompt[1]])
    assert place.blocks.num_known(prompt, has_states=True) == 128


def test_a_prompt_that_is_given_is_known_until_it_ends():
    place, prompt = Place(0), names(2)
    place.blocks.expect(prompt)
    place.blocks.expect(prompt)
    place.blocks.stop_expecting(prompt)
    assert place.blocks.num_known(prompt, has_states=True) == 128
    place.blocks.stop_expecting(prompt)
    assert place.blocks.num_known(prompt, has_states=False) == 0


def test_the_last_token_of_a_prompt_is_always_computed():
    request = Request(0, list(range(128)), SamplingParams())
    request.prefix.block_names = names(2)
    assert len(usable_names(request)) == 1


def test_a_replica_that_does_not_start_is_given_up():
    planned = Replacements(2, max_starts=2)
    assert planned.plan(0, has_failed=False) and planned.take_due() == [0]
    assert planned.plan(0, has_failed=True) and planned.take_due() == []  # after a pause
    assert not planned.plan(0, has_failed=True) and planned.given_up == {0}
    planned.started(1)
    assert planned.plan(1, has_failed=True) and not planned.are_all_given_up


class Maker:
    """What `take` needs of the front."""

    eos_ids, new_detokenizer = frozenset({2}), None


def engines_request(num_tokens, **params):
    made = Request(7, [5, 6], SamplingParams(**params))
    for token in range(10, 10 + num_tokens):
        made.output_ids.append(token)
        made.logprobs.append(-float(token))
    return made


def test_what_is_known_already_is_passed_over():
    front, replica = Request(3, [5, 6], SamplingParams()), engines_request(3)
    sent = Sent(3, replica)
    first = engines_request(0)
    begun = Sent(3, first)
    first.output_ids += [10, 11]
    first.logprobs += [-10.0, -11.0]
    take(front, begun.update(), Maker(), 0)
    replica.output_ids.append(13)
    replica.logprobs.append(-13.0)
    update = sent.update()._replace(
        first_token=1, output_ids=[11, 12, 13], first_logprob=1, logprobs=[-11.0, -12.0, -13.0]
    )
    take(front, update, Maker(), 1)
    assert front.output_ids == [10, 11, 12, 13] and front.logprobs == [-10.0, -11.0, -12.0, -13.0]
    assert known_answer(front).output_ids == front.output_ids


def test_tokens_that_end_the_answer_here_and_not_there_are_found():
    front, replica = Request(3, [5, 6], SamplingParams()), engines_request(0)
    sent = Sent(3, replica)
    replica.output_ids += [10, 2, 11]
    replica.logprobs += [-1.0, -1.0, -1.0]
    with pytest.raises(Differing, match="the answer ends"):
        take(front, sent.update(), Maker(), 0)
