"""What a client's own request asks for: its body is read as the server reads it, up to where the engine would begin. A
receipt is of this request where both agree."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lockstep.engine.request import SamplingParams
from lockstep.receipts import form as forms
from lockstep.receipts import parameters
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.parameters import seed_of
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict, false, unchecked
from lockstep.receipts.verify import Given
from lockstep.serve.errors import ApiError
from lockstep.serve.fields import body
from lockstep.serve.fields.receipt import receipt_options
from lockstep.serve.fields.seed import has_seed
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.limits import Limits
from lockstep.serve.service import Service
from lockstep.text.conversation import ChatModel

if TYPE_CHECKING:
    from lockstep.loading import LoadedModel

T = TypeVar("T")
F = TypeVar("F", bound=body.Fields)
PLAIN = "/v1/completions"  # the form of requests for answers that no API made
Prompts = Sequence[tuple[list[int], SamplingParams]]


class Stopped(Exception):
    """The request is read; the engine would begin now."""


class Reading(Generation):
    """A Generation that ends before it generates. prompts: of the request, and params of each; has_seed: whether the
    request has one; nonce: of its receipt."""

    def __init__(self, service: Service, raw: bytes) -> None:  # no client waits for it: nothing of a Generation's life
        self.service, self._raw = service, raw
        self.prompts: Prompts = ()
        self.has_seed, self.nonce = False, None

    async def read(self, fields: type[F]) -> F:
        """The body as an object of the class `fields`. ApiError 400 for a wrong one."""
        made: Any = body.parse_and_check(self._raw, fields, self.service.limits)
        options = receipt_options(made, PLAIN, None)
        self.has_seed = has_seed(made.seed)
        self.nonce = None if options is None else options.nonce
        return made

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function here."""
        return function(*args)

    async def prepare(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function here."""
        return function(*args)

    async def start(self, prompts: Prompts, *_: Any, **__: Any) -> Any:
        """Notes the prompts, and ends."""
        self.prompts = prompts
        raise Stopped


class Asked(NamedTuple):
    """A request, as far as a receipt can be compared with it."""

    prompts: Prompts
    has_seed: bool
    nonce: str | None
    max_positions: int

    def prompt_of(self, statement: Statement, salt: bytes | None) -> tuple[list[int], SamplingParams] | None:
        """The prompt of which a statement is, and its params; None where it is of none."""
        return next((each for each in self.prompts if statement.prompt.is_of(each[0], salt)), None)

    def difference(self, statement: Statement, salt: bytes | None = None) -> Verdict | None:
        """The first thing in which a statement differs from the request; None where it is of this request."""
        if statement.prompt.is_hidden and salt is None:
            return unchecked(
                "prompt", "the receipt hides the prompt: the salt of its commitment is needed, too (--salt)"
            )
        found = self.prompt_of(statement, salt)
        if found is None:
            return false("prompt", None, None, "the receipt is of another prompt than the request")
        if statement.nonce != self.nonce:
            reason = f"the request has the nonce {self.nonce!r}, the receipt {statement.nonce!r}"
            return false("nonce", statement.nonce, self.nonce, reason)
        return self._of_params(statement, found[0], found[1])

    def _of_params(self, statement: Statement, prompt_ids: list[int], params: SamplingParams) -> Verdict | None:
        asked, claimed = parameters.to_json(params), parameters.to_json(statement.params)
        if not self.has_seed:
            drawn = None if self.nonce is None else str(seed_of(self.nonce, prompt_ids))
            asked["seed"] = claimed.get("seed", "0") if drawn is None else drawn
            claimed.setdefault("seed", "0")
        for name in [*asked, *claimed]:
            if asked.get(name) != claimed.get(name):
                reason = f"the request has {name} {getattr(params, name)!r}, the receipt {_shown(statement, name)!r}"
                return false(f"sampling.{name}", claimed.get(name), asked.get(name), reason)
        context = statement.model.context
        is_cut = statement.answer.finish_reason == "length" and len(prompt_ids) + params.max_tokens == context
        if is_cut and context < self.max_positions:
            reason = (
                f"the answer ended at a context of {context} tokens, as no max_tokens ends it before; the model has"
            )
            return unchecked("model.context", f"{reason} {self.max_positions}, and who made it chose how many to use")
        form = forms.form_of(params.logits_mask)
        if statement.form != (form if forms.has_texts(statement.form) else forms.without_texts(form)):
            return false("form", None, None, "what held the answer to its form is not what the request asks for")
        return None


def _shown(statement: Statement, name: str) -> Any:
    value = getattr(statement.params, name)
    return float(f"{value:.7g}") if isinstance(value, float) else value


class ReadingService(Service):
    """A Service that reads requests and answers none. context: tokens of a prompt and its answer, where it was made."""

    def __init__(self, llm: "LoadedModel", chat: ChatModel | None, context: int, limits: Limits = Limits()) -> None:
        super().__init__("model", limits, names=None)
        self.llm, self.chat, self.context = llm, chat, context
        self.tokenizer = llm.tokenizer if llm.has_tokenizer else None

    @property
    def max_context(self) -> int:
        """The context for which an answer without a limit of its own was made."""
        return self.context


def with_request(
    llm: "LoadedModel", chat: ChatModel | None, raw: bytes, statement: Statement, given: Given
) -> Given | Verdict:
    """What a verifier has, with the prompt and the mask of the client's request; a Verdict where the statement is not
    of this request. See `read_request`."""
    asked = read_request(llm, chat, raw, statement)
    if (wrong := asked.difference(statement, given.salt)) is not None:
        return wrong
    found = asked.prompt_of(statement, given.salt)
    assert found is not None, "the statement is of one of its prompts"
    return given._replace(prompt_ids=found[0], logits_mask=found[1].logits_mask)


def read_request(llm: "LoadedModel", chat: ChatModel | None, raw: bytes, statement: Statement) -> Asked:
    """What a request's body asks for, as the API read it where the statement's answer was made. ReceiptError for a body
    that the API refuses, or an API that is not known. Any thread without an event loop may call this."""
    service, endpoint = ReadingService(llm, chat, statement.model.context), statement.endpoint or PLAIN
    try:
        reading = asyncio.run(_read(service, endpoint, raw))
        return Asked(reading.prompts, reading.has_seed, reading.nonce, llm.model.config.max_positions)
    except ApiError as error:
        raise ReceiptError(f"request: {error}") from None
    finally:
        service.close()


async def _read(service: Service, endpoint: str, raw: bytes) -> Reading:
    reading = Reading(service, raw)
    try:
        await _handler(service, endpoint)(reading)
    except Stopped:
        return reading
    raise AssertionError("a handler starts a generation")


def _handler(service: Service, endpoint: str) -> Callable[[Generation], Any]:
    from lockstep.serve.routes import chat, completions, messages, responses

    for module in (chat, completions, messages, responses):
        for route in module.routes(service):
            if route.path == endpoint and isinstance(route.endpoint, GenerationEndpoint):
                return route.endpoint.handler
    raise ReceiptError(f"endpoint: there is no {endpoint!r:.80} here that answers requests")
