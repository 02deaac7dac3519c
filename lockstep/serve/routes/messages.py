"""/v1/messages, Anthropic's API for conversations."""

from starlette.routing import Route

from lockstep.serve.answers.content_blocks import Blocks, collect
from lockstep.serve.answers.json_response import json_response
from lockstep.serve.answers.sse import EventStream, named_event
from lockstep.serve.fields.chat import arguments_of
from lockstep.serve.fields.messages import CountFields, MessagesFields, conversation
from lockstep.serve.fields.sampling import check_single
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.routes import conversation_routes
from lockstep.serve.service import Service

STOP_REASONS = dict(stop="end_turn", length="max_tokens", tool_calls="tool_use")
DELTAS = dict(
    text=("text_delta", "text"), thought=("thinking_delta", "thinking"), call=("input_json_delta", "partial_json")
)


def routes(service: Service):
    async def messages(generation: Generation):
        fields = await generation.read(MessagesFields)
        check_single(fields)
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        fields.stop = [*stop, *(fields.stop_sequences or ())]
        new_parser = await conversation_routes.start(generation, fields, conversation)
        answer = Answer(generation, new_parser)
        if fields.stream:
            return EventStream(generation, answer.events(), end=b"")
        await generation.finished()
        return json_response(await generation.offload(answer.whole))

    async def count(request):
        return json_response(
            dict(input_tokens=await conversation_routes.count(request, service, CountFields, conversation))
        )

    return [
        Route("/v1/messages", GenerationEndpoint(service, messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


class Answer:
    """The answer to one request."""

    def __init__(self, generation: Generation, new_parser) -> None:
        self._generation, self._request, self._new_parser = generation, generation.requests[0], new_parser
        self._head = dict(
            id=f"msg_{generation.exchange.id}", type="message", role="assistant", model=generation.model_name
        )

    def whole(self):
        """The response object."""
        blocks = collect(conversation_routes.read_all(self._new_parser, self._request))
        return self._head | dict(
            content=[whole_block(block) for block in blocks],
            **self._end(blocks),
            usage=self._usage(),
            **self._generation.receipt(0),
        )

    async def events(self):
        """Yields the events of a stream, the events of one step as one piece of bytes."""
        parser, blocks, begun = self._new_parser(), Blocks(), False
        async for ((_, tokens, reason),) in self._generation.tokens():
            made = [] if begun else [self._message_start()]
            begun = True
            found = parser.push("".join([token.text for token in tokens]))
            changes = list(blocks.add(found + (parser.finish(reason == "length") if reason else [])))
            changes += blocks.close() if reason else ()
            made += [block_event(*change) for change in changes]
            yield b"".join(made)
        end = dict(type="message_delta", delta=self._end(blocks.all), usage=self._usage())
        yield named_event("message_delta", end | self._generation.receipt(0))
        yield named_event("message_stop", dict(type="message_stop"))

    def _message_start(self):
        message = self._head | dict(
            content=[], stop_reason=None, stop_sequence=None, usage=self._usage() | dict(output_tokens=1)
        )
        return named_event("message_start", dict(type="message_start", message=message))

    def _end(self, blocks):
        """The fields that say why the answer ended."""
        sequence = self._request.stop_reason if isinstance(self._request.stop_reason, str) else None
        calls = 0 if blocks and blocks[-1].is_cut else sum(block.kind == "call" for block in blocks)
        reason = STOP_REASONS[conversation_routes.finish_reason(self._request, calls)]
        return dict(stop_reason="stop_sequence" if sequence else reason, stop_sequence=sequence)

    def _usage(self):
        usage = self._generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return dict(
            input_tokens=usage["prompt_tokens"] - cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
            output_tokens=usage["completion_tokens"],
        )


def whole_block(block):
    """A Block as one of Anthropic's content blocks."""
    if block.kind == "call":
        return dict(type="tool_use", id=tool_id(block), name=block.call.name, input=arguments_of(block.text))
    if block.kind == "thought":
        return dict(type="thinking", thinking=block.text, signature="")
    return dict(type="text", text=block.text)


def tool_id(block) -> str:
    """The id of a call in the form of Anthropic's API."""
    return f"toolu_{block.call.id}"


def block_event(change, block, event):
    """The events for a change of a Block, see `Blocks.add`."""

    def block_named_event(name: str, **fields: object) -> bytes:
        return named_event(name, dict(type=name, index=block.index, **fields))

    if change == "open":
        empty = dict(text=dict(type="text", text=""), thought=dict(type="thinking", thinking="", signature=""))
        start = empty.get(block.kind) or dict(type="tool_use", id=tool_id(block), name=block.call.name, input={})
        return block_named_event("content_block_start", content_block=start)
    if change == "piece":
        delta_type, key = DELTAS[block.kind]
        return block_named_event("content_block_delta", delta={"type": delta_type, key: event.text})
    signature = b""
    if block.kind == "thought":
        signature = block_named_event("content_block_delta", delta=dict(type="signature_delta", signature=""))
    return signature + block_named_event("content_block_stop")
