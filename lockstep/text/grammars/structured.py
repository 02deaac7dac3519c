"""Structured output: which tokens a grammar allows next, as masks for SamplingParams.logits_mask.

Grammars are llguidance's: JSON schemas, regular expressions (without lookaround: they run in linear time) and Lark.
A user's grammar is a program of a stranger, so its size, its nesting, the time it takes to compile and the work of one
mask are all bounded.
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

from lockstep.text.grammars.mask import GrammarMask, fill
from lockstep.text.grammars.matchers import GIVEN, MAX_GRAMMAR_BYTES, STACK_BYTES, Vocabulary, new_matcher, new_reader
from lockstep.text.grammars.proofs import Proofs, TooSlow
from lockstep.text.grammars.schemas import MAX_PATTERN_BYTES, check_numbers, check_size, exact, loosened
from lockstep.text.job_process import Busy
from lockstep.text.tokenizer.tokenizer import Tokenizer, check_text

MAX_RULES = 1000  # of a user's Lark grammar
QUICK_SECONDS = 0.25  # of the processor, to compile a grammar once beside others
MANY_SECONDS = 1.5  # to compile one that is quick for all samples
COMPILE_SECONDS = 3.0  # for all samples of a request
COMPILE_BYTES = 192 << 20  # for all samples of a request
RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_]", re.MULTILINE)  # the first line of one
JSON_INSIDE = re.compile(r"%json\s*")
# One space, or a line break and its indentation: without a bound a weak model writes white space for ever.
JSON_WHITESPACE = r"(\r?\n[ \t]{0,64}|[ \t])"


@contextmanager
def errors_about(field: str) -> Iterator[None]:
    """Errors inside of it begin with the field of a request that they are about."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("grammar: ")
        is_named = text.startswith(f"{field.partition(':')[0]}: ")
        raise type(error)(text if is_named else f"{field}: {text}") from None


def json_schema(schema: Any, strict: bool = True) -> str:
    """The grammar of JSON texts that a schema allows.

    strict: a keyword that cannot be enforced is an error; otherwise it is ignored (as are patterns with lookaround, or
    numbers that are too large), and oneOf is read as anyOf.
    """
    return llguidance.LLMatcher.grammar_from_json_schema(dump(with_options(schema, strict)))


def with_options(schema: Any, strict: bool = True) -> dict[str, Any]:
    """The schema with how llguidance is to read it; for `%json` inside a Lark grammar."""
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
    _check_bytes(_string("regular expression", pattern), MAX_PATTERN_BYTES)
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def lark(text: Any) -> str:
    """A grammar in llguidance's variant of Lark; its rule `start` is the answer."""
    _check_bytes(_string("Lark grammar", text), MAX_PATTERN_BYTES)
    if len(RULE.findall(text)) > MAX_RULES:
        raise ValueError(f"Lark grammar: at most {MAX_RULES} rules are allowed")
    end = 0
    while begin := JSON_INSIDE.search(text, end):
        schema, end = _json_at(text, begin.end())
        check_numbers(schema)
    return json.dumps({"grammars": [{"lark_grammar": text, "name": GIVEN}]})


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value in a text from here on, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Lark grammar: expected JSON after %json ({str(error)[:80]})") from None


def compose(rules: str, answer: str | None = None) -> str:
    """The grammar of Lark rules that we wrote. answer: a grammar that they name as @answer."""
    made = [{"lark_grammar": rules}]
    if answer is not None:
        first, *others = json.loads(answer)["grammars"]
        made += [{**first, "name": "answer"}, *others]
    return json.dumps({"grammars": made})


def choice(options: Any) -> str:
    """The grammar of a list of texts."""
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

    Each is compiled in another process first, which may be ended, and here only if that showed that it costs little.
    Nothing compiled is kept for other requests: copies of an llguidance matcher share an automaton that grows with what
    they read, so that its limits would be reached sooner or later depending on who else had asked.
    eos_ids end an answer: they are allowed where the grammar is complete. vocab_size: rows of the model.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self._tokenizer, self._eos_ids, self._vocab_size = tokenizer, sorted(eos_ids), vocab_size
        self._special = frozenset(tokenizer.special_ids) | frozenset(eos_ids)
        self._special_ids = sorted(i for i in self._special if i < vocab_size)
        self._reader: llguidance.LLTokenizer | None = None
        self._lock, self._slow = threading.Lock(), threading.Lock()
        self._compilers = _with_deep_stacks(2)
        self._proofs = Proofs(vocab_size, {i: tokenizer.token_bytes(i) for i in self._special_ids}, self._eos_ids)

    def warm(self) -> None:
        """Makes ready what the first grammar would wait for. It may take a second."""
        if self._eos_ids:
            self._proofs.jobs.start()
            self._tokens()

    def close(self) -> None:
        """Ends the threads and the process that compile; a grammar that comes later is refused."""
        self._compilers.shutdown(wait=False)
        self._proofs.jobs.close()

    def mask(
        self,
        grammar: str,
        num_samples: int = 1,
        trigger: int | None = None,
        after: int | None = None,
        once: bool = False,
    ) -> GrammarMask:
        """A mask that holds answers, so many samples, to a grammar made by one of this module's functions.

        trigger: a token id; the grammar then holds from that token on until it is complete, and again from the next
        such token; everything else is free. after: a token id before which no trigger counts. once: the answer ends
        where the grammar that a trigger began is complete. ValueError, with the reason, for a grammar that is wrong,
        too large or too slow to compile; Busy if others are being compiled that are as slow.
        """
        _check_bytes(grammar)
        if not self._eos_ids:
            raise ValueError("this model has no end token, so it cannot end an answer when a grammar is complete")
        matchers = self._compiled(grammar, num_samples)
        # drafts may make it necessary to compile again, and the engine waits for that
        may_draft = self._proofs.cost(grammar, QUICK_SECONDS, COMPILE_BYTES) is not None
        new_matcher = functools.partial(self._compile_beside, grammar)
        return GrammarMask(matchers, new_matcher, self.num_words, trigger, after, once, may_draft)

    def check(self, grammar: str) -> None:
        """ValueError for a grammar that `mask` would refuse."""
        self.mask(grammar)

    def _compiled(self, grammar: str, count: int) -> list[llguidance.LLMatcher]:
        """So many matchers. What takes long is done one at a time: it delays no grammar that does not."""
        cost = self._proofs.cost(grammar, QUICK_SECONDS, COMPILE_BYTES)
        if cost is not None and cost.seconds * count <= MANY_SECONDS and cost.num_bytes * count <= COMPILE_BYTES:
            return self._compilers.submit(self._compile_all, grammar, count).result()
        if not self._slow.acquire(blocking=False):
            raise Busy("another grammar that takes long to compile is being compiled", "grammars_busy")
        try:
            cost = cost or self._proofs.cost(grammar, COMPILE_SECONDS, COMPILE_BYTES)
            if cost is None or cost.seconds * count > COMPILE_SECONDS:
                raise TooSlow(
                    f"the grammar did not compile {f'{count} times ' * (count > 1)}within {COMPILE_SECONDS:g} s"
                )
            if cost.num_bytes * count > COMPILE_BYTES:
                raise TooSlow(f"the grammar takes more than {COMPILE_BYTES >> 20} MB")
            return self._compilers.submit(self._compile_all, grammar, count).result()
        finally:
            self._slow.release()

    def _compile_all(self, grammar: str, count: int) -> list[llguidance.LLMatcher]:
        return [self._compile(grammar) for _ in range(count)]

    def _compile_beside(self, grammar: str) -> llguidance.LLMatcher:
        return self._compilers.submit(self._compile, grammar).result()

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = new_matcher(self._tokens(), grammar)
        fill(matcher, np.zeros(self.num_words, np.uint32))  # most of a first mask's work is done here, in this thread
        return matcher

    def _tokens(self) -> llguidance.LLTokenizer:
        """llguidance's form of the vocabulary, made once."""
        with self._lock:
            if self._reader is None:
                known = range(min(self._tokenizer.vocab_size, self._vocab_size))
                tokens, bos_id = [self._tokenizer.token_bytes(i) for i in known], self._tokenizer.bos_id
                vocabulary = Vocabulary(tokens, self._special_ids, self._eos_ids[0], bos_id, self._exact_ids)
                self._reader = new_reader(vocabulary, self._vocab_size, self._eos_ids)
            return self._reader

    def _exact_ids(self, text: str) -> list[int]:
        """Ids of ordinary tokens whose bytes are exactly those of a text; none if the tokenizer cannot give such.

        Where the text of a special token stands in it, it is cut there: what a grammar quotes is text, and the special
        token would be none of it, but end the answer or stand for something else.
        """
        if self._special.isdisjoint(self._tokenizer.encode(text, add_special_tokens=False)):
            return self._ids_of(text)
        middle = len(text) // 2
        halves = [self._exact_ids(half) for half in (text[:middle], text[middle:])] if middle else []
        return [token for half in halves for token in half] if all(halves) else []

    def _ids_of(self, text: str) -> list[int]:
        """The same for a text without that of a special token."""
        for marked in (text, "\n" + text):  # some tokenizers put a space before the first word, so before the mark
            ids = self._tokenizer.encode(marked, add_special_tokens=False)
            for skipped in range(min(4, len(ids))):
                if b"".join(map(self._tokenizer.token_bytes, ids[skipped:])) == text.encode():
                    return ids[skipped:]
        return []


def _with_deep_stacks(count: int) -> ThreadPoolExecutor:
    """An executor of so many threads that have been started with large stacks."""
    made, all_there = ThreadPoolExecutor(count, "lockstep grammar"), threading.Barrier(count + 1)
    usual = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(count):
            made.submit(all_there.wait)
    finally:
        threading.stack_size(usual)
    all_there.wait()
    return made


def dump(value: Any) -> str:
    """JSON text of a schema, whose size is bounded."""
    text = json.dumps(value)
    _check_bytes(text)
    return text


def _check_bytes(text: str, most: int = MAX_GRAMMAR_BYTES) -> None:
    if len(text) > most:
        raise ValueError(f"grammar of {len(text)} characters, at most {most} are allowed")


def _string(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what}: expected a text, got {value!r:.80}")
    with errors_about(what):
        check_text(value)
    return value
