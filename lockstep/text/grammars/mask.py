"""`GrammarMask`: the logits mask of constrained decoding, with one grammar matcher for each sample."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import llguidance
import numpy as np

from lockstep.text.grammars.matchers import check
from lockstep.text.speculative_mask import SpeculativeMask

MAX_SAMPLES = 128  # samples whose matchers are kept, those last used: the most that n allows


def fill(matcher: llguidance.LLMatcher, words: np.ndarray) -> np.ndarray:
    """Writes a matcher's mask into `words` (uint32) and returns them. ValueError if the matcher reached a limit."""
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    check(matcher)
    return words


@dataclass
class Sample:
    """The state of one sample.

    output_ids: its list of output tokens, kept alive so that no other list can get its id(). compiled: the grammar at
    its beginning. matcher: the matcher that restricts the next token; None while every token is allowed. armed: whether
    the trigger token starts the grammar. num_read: output tokens that were read. has_read_drafts: whether the matcher
    has read drafts since it was compiled. may_draft: whether it may read drafts.
    """

    output_ids: list[int]
    compiled: llguidance.LLMatcher
    matcher: llguidance.LLMatcher | None
    armed: bool
    num_read: int = 0
    has_read_drafts: bool = False
    may_draft: bool = True


class GrammarMask(SpeculativeMask):
    """A logits mask for SamplingParams.logits_mask that holds samples, of one request or of several, to a grammar.

    Each sample has a matcher that advances with its output: one of `matchers`, or a new one from new_matcher. The
    returned array is overwritten by the next call. num_words: uint32 words of a mask. trigger, after, before, once:
    see `structured.Grammars.mask`. may_draft: whether compiling takes so little that reading drafts, which may make it
    necessary to compile again, is allowed. grammar: the text of it, from which a receipt makes the mask again.
    """

    def __init__(
        self,
        matchers: list[llguidance.LLMatcher],
        new_matcher: Callable[[], llguidance.LLMatcher],
        num_words: int,
        trigger: int | None = None,
        after: int | None = None,
        once: bool = False,
        *,
        before: int | None = None,
        may_draft: bool = True,
        grammar: str = "",
    ) -> None:
        self.grammar, self.trigger, self.after, self.before, self.once = grammar, trigger, after, before, once
        self._unused, self._new_matcher, self._may_draft = matchers, new_matcher, may_draft
        self._words = np.zeros(num_words, np.uint32)
        self._samples: OrderedDict[int, Sample] = OrderedDict()

    def __call__(self, output_ids: list[int]) -> np.ndarray | None:
        sample = self._sample(output_ids)
        try:
            return self._mask(self._up_to_date(sample))
        except ValueError:
            if not sample.has_read_drafts:
                raise
        self._begin_again(sample)  # the limit may have been reached by drafts, which must not end an answer
        return self._mask(self._up_to_date(sample))

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray | None]:
        if not first:
            yield self(output_ids)
        sample = self._up_to_date(self._sample(output_ids))
        with contextlib.closing(self._followed(sample, drafts)) as states:
            for matcher in itertools.islice(states, max(0, first - 1), None):
                try:
                    words = None if matcher is None else fill(matcher, self._words)
                except ValueError:
                    return  # the error is raised by __call__, once the tokens are final
                yield words

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        sample = self._up_to_date(self._sample(output_ids))
        if not drafts or not sample.may_draft:
            return sample.matcher.compute_ff_tokens() if sample.matcher is not None and sample.may_draft else []
        with contextlib.closing(self._followed(sample, drafts)) as states:
            matchers = list(zip(drafts, states, strict=False))
            matcher = matchers[-1][1] if len(matchers) == len(drafts) else None
            return [] if matcher is None else matcher.compute_ff_tokens()

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        sample = self._up_to_date(self._sample(output_ids))
        if self.trigger is None and sample.matcher is not None and sample.may_draft:
            return sample.matcher.validate_tokens(list(drafts))
        return sum(1 for _ in self._followed(sample, drafts))

    def _sample(self, output_ids: list[int]) -> Sample:
        """The Sample of this list of output tokens; a new one for a new list."""
        sample = self._samples.get(id(output_ids))
        if sample is None or sample.num_read > len(output_ids):
            compiled = self._unused.pop() if self._unused else self._new_matcher()
            matcher = compiled if self.trigger is None else None
            sample = Sample(output_ids, compiled, matcher, self._begins_armed, may_draft=self._may_draft)
            self._samples[id(output_ids)] = sample
            if len(self._samples) > MAX_SAMPLES:
                self._samples.popitem(last=False)
        self._samples.move_to_end(id(output_ids))  # the first are those that were not used for the longest time
        return sample

    def _mask(self, sample: Sample) -> np.ndarray | None:
        return None if sample.matcher is None else fill(sample.matcher, self._words)

    def _up_to_date(self, sample: Sample) -> Sample:
        """Reads the sample's new output tokens; returns the sample. ValueError for a token that is not allowed, or if a
        limit is reached."""
        for token in sample.output_ids[sample.num_read :]:
            self._read(sample, token)
        return sample

    def _read(self, sample: Sample, token: int) -> None:
        sample.num_read += 1
        if sample.matcher is not None:
            if not sample.matcher.consume_token(token):
                check(sample.matcher)
            if self._is_over(sample.matcher):
                sample.matcher = None
        elif token == self.trigger and sample.armed:
            sample.matcher = sample.compiled.deep_copy()
        else:
            sample.armed = self._is_armed(sample.armed, token)

    @property
    def _begins_armed(self) -> bool:
        return self.after is None or self.before is not None

    def _is_armed(self, armed: bool, token: int) -> bool:
        """Whether the trigger starts the grammar behind this token. armed: whether it did so before it."""
        return token == self.after or (armed and token != self.before)

    def _is_over(self, matcher: llguidance.LLMatcher) -> bool:
        """Whether a grammar that the trigger started is complete, so that every token is allowed again."""
        return self.trigger is not None and not self.once and matcher.is_stopped()

    def _begin_again(self, sample: Sample) -> None:
        """Compiles the grammar again and reads the output without any drafts, so that limits are reached exactly where
        they would be without speculation. From now on this sample has no drafts: it is compiled again once at most."""
        sample.compiled, output = self._new_matcher(), sample.output_ids[: sample.num_read]
        sample.matcher = sample.compiled if self.trigger is None else None
        sample.armed, sample.num_read, sample.has_read_drafts = self._begins_armed, 0, False
        sample.may_draft = False
        for token in output:
            self._mask(sample)
            self._read(sample, token)

    def _followed(self, sample: Sample, drafts: Sequence[int]) -> Generator[llguidance.LLMatcher | None]:
        """Yields the matcher (None: every token is allowed) after each draft, up to the first that is not allowed. At
        the end the matcher is rolled back."""
        if not drafts or not sample.may_draft:
            return
        sample.has_read_drafts = True
        matcher, armed, num_to_forget = sample.matcher, sample.armed, 0
        try:
            for token in drafts:
                if matcher is not None:
                    if not matcher.try_consume_tokens([token]):
                        return
                    num_to_forget += matcher is sample.matcher
                    matcher = None if self._is_over(matcher) else matcher
                elif token == self.trigger and armed:
                    matcher = sample.compiled.deep_copy()
                else:
                    armed = self._is_armed(armed, token)
                yield matcher
        finally:
            if num_to_forget and sample.matcher is not None:
                sample.matcher.rollback(num_to_forget)
