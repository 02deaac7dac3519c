"""A stream whose request is run by the steps of other threads' calls."""

from lockstep.completion import CompletionStream

ALL = list(range(9))


class Growing(list):
    """A list that has one value more as soon as its length has been read, as if another thread's step had come."""

    def __init__(self, first, left):
        super().__init__(first)
        self.left = list(left)

    def __len__(self):
        seen = super().__len__()
        if self.left:
            self.append(self.left.pop(0))
        return seen


class Shared:
    """A request that other threads run to its end."""

    num_given = num_given_characters = 0
    text, stop_reason, error = "", 8, None
    prompt_ids = prompt_logprobs = prompt_top_logprobs = ()

    def __init__(self):
        self.output_ids = Growing(ALL[:1], ALL[1:])
        self.logprobs, self.top_logprobs = [-float(n) for n in ALL], [{n: -float(n)} for n in ALL]

    @property
    def finish_reason(self):
        return None if self.output_ids.left else "stop"


class NoSteps:
    """An engine whose steps are all run by others."""

    def step(self):
        raise AssertionError("there was a token to return")

    def cancel(self, request):
        pass


def test_every_token_is_in_one_chunk():
    """With its log-probabilities, whatever comes while a chunk is made."""
    chunks = list(CompletionStream(NoSteps(), Shared()))
    assert [token for chunk in chunks for token in chunk.token_ids] == ALL
    assert [value for chunk in chunks for value in chunk.logprobs] == [-float(n) for n in ALL]
    for chunk in chunks:
        assert len(chunk.token_ids) == len(chunk.logprobs) == len(chunk.top_logprobs)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [chunk.stop_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [8]
