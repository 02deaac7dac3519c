"""/v1/messages, Anthropic's form of a conversation."""

import secrets

from starlette.routing import Route

from lockstep.serve.answers.content_blocks import Blocks, collect
from lockstep.serve.answers.json_response import json_response
from lockstep.serve.answers.sse import EventStream, named
from lockstep.serve.fields.chat import arguments_of
from lockstep.serve.fields.messages import CountFields, MessagesFields, conversation
from lockstep.serve.fields.sampling import check_single
from lockstep.serve.generation import Generates, Job
from lockstep.serve.routes import conversation_routes as talk
from lockstep.serve.service import Service

STOP_REASONS = dict(stop="end_turn", length="max_tokens", tool_calls="tool_use")
DELTAS = dict(
    text=("text_delta", "text"), thought=("thinking_delta", "thinking"), call=("input_json_delta", "partial_json")
)


def routes(service: Service):
    async def messages(job: Job):
        fields = await job.read(MessagesFields)
        check_single(fields)
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        fields.stop = [*stop, *(fields.stop_sequences or ())]
        new_parser = await talk.start(job, fields, conversation)
        answer = Answer(job, new_parser)
        if fields.stream:
            return EventStream(job, answer.events(), end=b"")
        await job.finished()
        return json_response(await job.offload(answer.whole))

    async def count(request):
        return json_response(dict(input_tokens=await talk.count(request, service, CountFields, conversation)))

    return [
        Route("/v1/messages", Generates(service, messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


class Answer:
    """The answer to one request."""

    def __init__(self, job: Job, new_parser) -> None:
        self._job, self._request, self._new_parser = job, job.requests[0], new_parser
        self._head = dict(id=f"msg_{secrets.token_hex(12)}", type="message", role="assistant", model=job.model_name)

    def whole(self):
        """The response."""
        blocks = collect(talk.read_all(self._new_parser, self._request))
        return self._head | dict(
            content=[whole_block(block) for block in blocks], **self._end(blocks), usage=self._usage()
        )

    async def events(self):
        """The events of a stream, those of one step together."""
        parser, blocks, begun = self._new_parser(), Blocks(), False
        async for ((_, tokens, reason),) in self._job.tokens():
            made = [] if begun else [self._message_start()]
            begun = True
            found = parser.push("".join([token.text for token in tokens]))
            changes = list(blocks.add(found + (parser.finish(reason == "length") if reason else [])))
            changes += blocks.close() if reason else ()
            made += [block_event(*change) for change in changes]
            yield b"".join(made)
        yield named("message_delta", dict(type="message_delta", delta=self._end(blocks.all), usage=self._usage()))
        yield named("message_stop", dict(type="message_stop"))

    def _message_start(self):
        message = self._head | dict(
            content=[], stop_reason=None, stop_sequence=None, usage=self._usage() | dict(output_tokens=1)
        )
        return named("message_start", dict(type="message_start", message=message))

    def _end(self, blocks):
        """Why the answer ended."""
        sequence = self._request.stop_reason if isinstance(self._request.stop_reason, str) else None
        calls = 0 if blocks and blocks[-1].is_cut else sum(block.kind == "call" for block in blocks)
        reason = STOP_REASONS[talk.finish_reason(self._request, calls)]
        return dict(stop_reason="stop_sequence" if sequence else reason, stop_sequence=sequence)

    def _usage(self):
        usage = self._job.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return dict(
            input_tokens=usage["prompt_tokens"] - cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
            output_tokens=usage["completion_tokens"],
        )


def whole_block(block):
    """A Block in Anthropic's form."""
    if block.kind == "call":
        return dict(type="tool_use", id=tool_id(block), name=block.call.name, input=arguments_of(block.text))
    if block.kind == "thought":
        return dict(type="thinking", thinking=block.text, signature="")
    return dict(type="text", text=block.text)


def tool_id(block) -> str:
    """A call's id as Anthropic's clients expect one."""
    return f"toolu_{block.call.id}"


def block_event(what, block, event):
    """What a change of a Block looks like in a stream."""

    def told(kind: str, **fields: object) -> bytes:
        return named(kind, dict(type=kind, index=block.index, **fields))

    if what == "open":
        empty = dict(text=dict(type="text", text=""), thought=dict(type="thinking", thinking="", signature=""))
        start = empty.get(block.kind) or dict(type="tool_use", id=tool_id(block), name=block.call.name, input={})
        return told("content_block_start", content_block=start)
    if what == "piece":
        kind, key = DELTAS[block.kind]
        return told("content_block_delta", delta={"type": kind, key: event.text})
    signed = b""
    if block.kind == "thought":
        signed = told("content_block_delta", delta=dict(type="signature_delta", signature=""))
    return signed + told("content_block_stop")
