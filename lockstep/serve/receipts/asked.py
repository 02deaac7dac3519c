"""What a client's own request asks for: its body is read as the server reads it, up to where the engine would begin. A
receipt is of this request where both agree."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep.receipts.around.asked import Asked, Prompts
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict
from lockstep.receipts.verify import Given
from lockstep.serve.continuation import ANEW, Continuation
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


class Stopped(Exception):
    """The request is read; the engine would begin now."""


class Reading(Generation):
    """A Generation that ends before it generates. prompts: of the request, and params of each; begun: see Asked;
    has_seed: whether the request has one; nonce: of its receipt."""

    def __init__(self, service: Service, raw: bytes) -> None:  # no client waits for it: nothing of a Generation's life
        self.service, self._raw = service, raw
        self.prompts: Prompts = ()
        self.begun: Any = ()
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

    async def start(
        self,
        prompts: Prompts,
        cache_salt: str = "",
        narrowing: Any = (),
        prediction: Any = (),
        continuation: Continuation = ANEW,
    ) -> Any:
        """Notes the prompts and how their answers begin, and ends."""
        self.prompts, self.begun = prompts, continuation.output_ids
        raise Stopped


class ReadingService(Service):
    """A Service that reads requests and answers none. context: tokens of a prompt and its answer, where it was made.
    has_defaults: whether requests have the sampling of the model's makers where they have none."""

    def __init__(self, llm: "LoadedModel", chat: ChatModel | None, context: int, has_defaults: bool) -> None:
        super().__init__("model", Limits(), names=None)
        self.llm, self.chat, self.context, self._has_defaults = llm, chat, context, has_defaults
        self.tokenizer = llm.tokenizer if llm.has_tokenizer else None

    @property
    def max_context(self) -> int:
        """The context for which an answer without a limit of its own was made."""
        return self.context

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling of requests that have none."""
        return self.loaded.sampling_defaults if self._has_defaults else {}


def with_request(
    llm: "LoadedModel", chat: ChatModel | None, raw: bytes, statement: Statement, given: Given, index: int | None = None
) -> Given | Verdict:
    """What a verifier has, with the prompt and the mask of the client's request; a Verdict where the statement is not
    of this request. index: of the choice, where that is known.

    Sampling that the request leaves out is that of the model's makers, or of OpenAI's API: a server may have either
    (--generation-config). ReceiptError for a body that the API refuses, or an API that is not known. Any thread without
    an event loop may call this.
    """
    wrong: Verdict | None = None
    for has_defaults in (True, False):
        asked = read_request(llm, chat, raw, statement, has_defaults)
        asked = asked if index is None else asked.at(index)
        found = asked.difference(statement, given.salt, given.output_ids)
        if found is None:
            number = asked.number_of(statement, given.salt)
            assert number is not None, "the statement is of one of its prompts"
            ids, params = asked.prompts[number]
            return given._replace(prompt_ids=ids, logits_mask=params.logits_mask)
        wrong = wrong or found
        if not found.what.startswith("sampling."):
            break
    assert wrong is not None, "there is a difference"
    return wrong


def read_request(
    llm: "LoadedModel", chat: ChatModel | None, raw: bytes, statement: Statement, has_defaults: bool = True
) -> Asked:
    """What a request's body asks for, as the API read it where the statement's answer was made; see `with_request`."""
    endpoint, context, own = statement.endpoint or PLAIN, statement.model.context, llm.model.config.max_positions
    reading = _reading(ReadingService(llm, chat, context, has_defaults), endpoint, raw)
    uncut: Prompts = ()
    if context < own:
        uncut = _reading(ReadingService(llm, chat, own, has_defaults), endpoint, raw).prompts
    return Asked(reading.prompts, reading.has_seed, reading.nonce, uncut, reading.begun)


def _reading(service: Service, endpoint: str, raw: bytes) -> Reading:
    try:
        return asyncio.run(_read(service, endpoint, raw))
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
