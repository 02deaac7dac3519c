"""Constrained decoding (structured outputs): compiles grammars to logits masks for SamplingParams.logits_mask.

Grammars are llguidance's: JSON schemas, regular expressions (without lookaround: they run in linear time) and Lark.
A user's grammar is untrusted, so its size, its nesting, the time it takes to compile and the work of one mask are all
bounded.
"""

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import llguidance
import numpy as np

from lockstep.text.grammars.compile_costs import CompileCosts, TooSlow
from lockstep.text.grammars.gbnf import is_gbnf, to_lark
from lockstep.text.grammars.mask import GrammarMask, fill
from lockstep.text.grammars.matchers import GIVEN, MAX_GRAMMAR_BYTES, STACK_BYTES, Vocabulary, new_matcher, new_reader
from lockstep.text.grammars.schemas import MAX_PATTERN_BYTES, check_numbers, check_size, exact, loosened
from lockstep.text.job_process import Busy
from lockstep.text.tokenizer.tokenizer import Tokenizer, check_text

MAX_RULES = 1000  # of a user's Lark grammar
QUICK_SECONDS = 0.25  # of processor time: a grammar that compiles within it may compile beside others
MANY_SECONDS = 1.5  # for a quick grammar and all samples of a request, beside others
COMPILE_SECONDS = 3.0  # for any grammar and all samples of a request, one grammar at a time
COMPILE_BYTES = 192 << 20  # for all samples of a request
RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_]", re.MULTILINE)  # the first line of a rule
JSON_INSIDE = re.compile(r"%json\s*")
# One space, or a line break and its indentation. It is bounded because a weak model may never stop writing white space.
JSON_WHITESPACE = r"(\r?\n[ \t]{0,64}|[ \t])"


@contextmanager
def errors_about(field: str) -> Iterator[None]:
    """Makes the messages of ValueErrors inside of the `with` block begin with the name of the request's field."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("grammar: ")
        is_named = text.startswith(f"{field.partition(':')[0]}: ")
        raise type(error)(text if is_named else f"{field}: {text}") from None


def json_schema(schema: Any, strict: bool = True) -> str:
    """The grammar of the JSON texts that a schema allows.

    strict: a keyword that cannot be enforced is a ValueError. Otherwise such a keyword, a pattern with lookaround or a
    number that is too large is ignored, and oneOf is read as anyOf.
    """
    return llguidance.LLMatcher.grammar_from_json_schema(dump(with_options(schema, strict)))


def with_options(schema: Any, strict: bool = True) -> dict[str, Any]:
    """The schema with llguidance's options added to it, for `%json` inside of a Lark grammar."""
    if not isinstance(schema, dict):
        raise ValueError(f"JSON schema: expected an object, got {schema!r:.80}")
    check_size(schema)
    schema = exact(schema) if strict else loosened(schema)
    check_numbers(schema)
    options = dict(whitespace_pattern=JSON_WHITESPACE, lenient=not strict, coerce_one_of=not strict)
    return {**schema, "x-guidance": options}


def json_object() -> str:
    """The grammar of all JSON objects."""
    return json_schema({"type": "object"})


def regex(pattern: Any) -> str:
    """The grammar of texts that match a regular expression as a whole (Rust's syntax, without lookaround)."""
    _check_length(_string("regular expression", pattern), MAX_PATTERN_BYTES)
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def lark(text: Any) -> str:
    """A grammar in llguidance's variant of Lark; its rule `start` is the answer."""
    _check_length(_string("Lark grammar", text), MAX_PATTERN_BYTES)
    if len(RULE.findall(text)) > MAX_RULES:
        raise ValueError(f"Lark grammar: at most {MAX_RULES} rules are allowed")
    end = 0
    while begin := JSON_INSIDE.search(text, end):
        schema, end = _json_at(text, begin.end())
        check_numbers(schema)
    return json.dumps({"grammars": [{"lark_grammar": text, "name": GIVEN}]})


def lark_or_gbnf(text: Any) -> str:
    """The grammar of a text in Lark, or in llama.cpp's GBNF."""
    return lark(to_lark(text) if isinstance(text, str) and is_gbnf(text) else text)


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and the offset of its end."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Lark grammar: expected JSON after %json ({str(error)[:80]})") from None


def compose(rules: str, answer: str | None = None) -> str:
    """The grammar of Lark rules that Lockstep wrote. answer: the grammar that the rules name as @answer."""
    grammars = [{"lark_grammar": rules}]
    if answer is not None:
        first, *others = json.loads(answer)["grammars"]
        grammars += [{**first, "name": "answer"}, *others]
    return json.dumps({"grammars": grammars})


def choice(options: Any) -> str:
    """The grammar of answers that are one of the texts in a list."""
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o for o in options):
        raise ValueError("choice: expected a list of one or more texts")
    for option in options:
        _string("choice", option)
    return compose("start: " + " | ".join(map(quote, options)))


def quote(text: str) -> str:
    """A text as a literal in a Lark grammar."""
    return json.dumps(text)


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may use it.

    A grammar is compiled in a worker process first, which can be killed, and in this process only if that cost little.
    No compiled grammar is shared between requests: copies of an llguidance matcher share an automaton that grows with
    the tokens they read, so the point where its limits are reached would depend on other requests.
    eos_ids: end tokens, allowed where the grammar is complete. vocab_size: of the model's logits.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self._tokenizer, self._eos_ids, self._vocab_size = tokenizer, sorted(eos_ids), vocab_size
        self._special = frozenset(tokenizer.special_ids) | frozenset(eos_ids)
        self._special_ids = sorted(i for i in self._special if i < vocab_size)
        self._reader: llguidance.LLTokenizer | None = None
        self._lock, self._slow = threading.Lock(), threading.Lock()
        self._compilers = _with_deep_stacks(2)
        self._costs = CompileCosts(vocab_size, {i: tokenizer.token_bytes(i) for i in self._special_ids}, self._eos_ids)

    def warm(self) -> None:
        """Starts the worker process and prepares the vocabulary, so that the first grammar does not wait a second."""
        if self._eos_ids:
            self._costs.jobs.start()
            self._tokens()

    def close(self) -> None:
        """Ends the threads and the worker process that compile. A grammar that comes later is refused."""
        self._compilers.shutdown(wait=False)
        self._costs.jobs.close()

    def mask(
        self,
        grammar: str,
        num_samples: int = 1,
        trigger: int | None = None,
        after: int | None = None,
        once: bool = False,
        before: int | None = None,
    ) -> GrammarMask:
        """A logits mask that holds the samples of a request to a grammar made by one of this module's functions.

        trigger: a token id. The grammar then holds only from this token until the grammar is complete, and again from
        the next such token; elsewhere any token is allowed. after: a token id; a trigger before it does not count.
        before: a token id; then triggers count from the beginning, but not between this token and the next `after`.
        once: the answer ends where the grammar that the trigger started is complete. ValueError, with the reason, for a
        grammar that is wrong, too large or too slow to compile; Busy while another slow grammar is being compiled.
        """
        _check_length(grammar)
        if not self._eos_ids:
            raise ValueError("this model has no end token, so it cannot end an answer when a grammar is complete")
        matchers = self._compiled(grammar, num_samples)
        # drafts may make it necessary to compile again, and the engine's thread would wait for a slow grammar
        may_draft = self._costs.cost(grammar, QUICK_SECONDS, COMPILE_BYTES) is not None
        new_matcher = functools.partial(self._compile_in_pool, grammar)
        places: dict[str, Any] = dict(trigger=trigger, after=after, once=once, before=before)
        return GrammarMask(matchers, new_matcher, self.num_words, **places, may_draft=may_draft, grammar=grammar)

    def check(self, grammar: str) -> None:
        """ValueError for a grammar that `mask` would refuse."""
        self.mask(grammar)

    def _compiled(self, grammar: str, num_samples: int) -> list[llguidance.LLMatcher]:
        """A matcher for each sample. Slow grammars are compiled one at a time, so that they do not delay quick ones."""
        cost = self._costs.cost(grammar, QUICK_SECONDS, COMPILE_BYTES)
        if cost is not None and cost.fits(num_samples, MANY_SECONDS, COMPILE_BYTES):
            return self._compilers.submit(self._compile_all, grammar, num_samples).result()
        if not self._slow.acquire(blocking=False):
            raise Busy("another grammar that takes long to compile is being compiled", "grammars_busy")
        try:
            cost = cost or self._costs.cost(grammar, COMPILE_SECONDS, COMPILE_BYTES)
            if cost is None or cost.seconds * num_samples > COMPILE_SECONDS:
                times = f"{num_samples} times " if num_samples > 1 else ""
                raise TooSlow(f"the grammar did not compile {times}within {COMPILE_SECONDS:g} s")
            if cost.num_bytes * num_samples > COMPILE_BYTES:
                raise TooSlow(f"the grammar takes more than {COMPILE_BYTES >> 20} MB")
            return self._compilers.submit(self._compile_all, grammar, num_samples).result()
        finally:
            self._slow.release()

    def _compile_all(self, grammar: str, num_samples: int) -> list[llguidance.LLMatcher]:
        return [self._compile(grammar) for _ in range(num_samples)]

    def _compile_in_pool(self, grammar: str) -> llguidance.LLMatcher:
        return self._compilers.submit(self._compile, grammar).result()

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = new_matcher(self._tokens(), grammar)
        fill(
            matcher, np.zeros(self.num_words, np.uint32)
        )  # the first mask takes longest: compute it here, not in the engine's thread
        return matcher

    def _tokens(self) -> llguidance.LLTokenizer:
        """llguidance's form of the vocabulary, made with the first grammar."""
        with self._lock:
            if self._reader is None:
                known = range(min(self._tokenizer.vocab_size, self._vocab_size))
                tokens, bos_id = [self._tokenizer.token_bytes(i) for i in known], self._tokenizer.bos_id
                # Rows of the logits without a token: llguidance gives its mask one bit for each entry of this list.
                tokens += [b""] * (self._vocab_size - len(tokens))
                vocabulary = Vocabulary(tokens, self._special_ids, self._eos_ids[0], bos_id, self._exact_ids)
                self._reader = new_reader(vocabulary, self._vocab_size, self._eos_ids)
            return self._reader

    def _exact_ids(self, text: str) -> list[int]:
        """Ids of ordinary tokens whose bytes are exactly those of a text; empty if the tokenizer cannot give them.

        If the text has the text of a special token in it, it is encoded in halves until it is cut there: a grammar's
        quoted text is ordinary text, and the special token would end the answer or have another meaning.
        """
        if self._special.isdisjoint(self._tokenizer.encode(text, add_special_tokens=False)):
            return self._ids_of(text)
        middle = len(text) // 2
        halves = [self._exact_ids(half) for half in (text[:middle], text[middle:])] if middle else []
        return [token for half in halves for token in half] if all(halves) else []

    def _ids_of(self, text: str) -> list[int]:
        """As `_exact_ids`, for a text in which no special token is recognized."""
        for marked in (text, "\n" + text):  # after a line break: some tokenizers put a space before the first word
            ids = self._tokenizer.encode(marked, add_special_tokens=False)
            for skipped in range(min(4, len(ids))):
                if b"".join(map(self._tokenizer.token_bytes, ids[skipped:])) == text.encode():
                    return ids[skipped:]
        return []


def _with_deep_stacks(num_threads: int) -> ThreadPoolExecutor:
    """An executor with threads that have stacks of STACK_BYTES. All are started here, while that size is set."""
    executor, all_started = ThreadPoolExecutor(num_threads, "lockstep grammar"), threading.Barrier(num_threads + 1)
    usual = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(num_threads):
            executor.submit(all_started.wait)
    finally:
        threading.stack_size(usual)
    all_started.wait()
    return executor


def dump(value: Any) -> str:
    """The JSON text of a schema. ValueError if it is longer than MAX_GRAMMAR_BYTES."""
    text = json.dumps(value)
    _check_length(text)
    return text


def _check_length(text: str, max_chars: int = MAX_GRAMMAR_BYTES) -> None:
    if len(text) > max_chars:
        raise ValueError(f"grammar of {len(text)} characters, at most {max_chars} are allowed")


def _string(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what}: expected a text, got {value!r:.80}")
    with errors_about(what):
        check_text(value)
    return value
