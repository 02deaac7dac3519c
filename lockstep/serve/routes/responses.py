"""/v1/responses, OpenAI's newer API for conversations; nothing is stored."""

import secrets
import time

from starlette.requests import ClientDisconnect
from starlette.routing import Route

from lockstep.engine.token_stream import until_the_end
from lockstep.serve.answers.content_blocks import Blocks, collect
from lockstep.serve.answers.json_response import in_parts, json_response
from lockstep.serve.answers.logprobs import token_logprob
from lockstep.serve.answers.sse import EventStream, json_answer, named_event
from lockstep.serve.answers.token_spans import TokenSpanParser
from lockstep.serve.errors import openai_shape
from lockstep.serve.fields.prompts import text_tokenizer
from lockstep.serve.fields.responses import ResponsesFields, conversation, num_logprobs
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.routes import conversation_routes
from lockstep.serve.service import Service

ITEM_STATUS = {False: "completed", True: "incomplete"}  # by whether the answer was cut off within the item
PARTS = dict(text="output_text", thought="reasoning_text")
PIECES = dict(text="response.output_text", thought="response.reasoning_text", call="response.function_call_arguments")


def routes(service: Service):
    async def responses(generation: Generation):
        fields = await generation.read(ResponsesFields)
        logprobs = num_logprobs(fields, service.limits)
        new_parser = await conversation_routes.start(generation, fields, conversation, logprobs=logprobs)
        answer = Answer(generation, fields, new_parser, logprobs is not None)
        if fields.stream:
            return EventStream(generation, answer.events(), end=b"")
        tokens = [token async for ((_, found, _),) in generation.tokens(until_the_end) for token in found]
        return await json_answer(generation, lambda: answer.whole(tokens))

    async def count(request):
        made = await conversation_routes.count(request, service, ResponsesFields, conversation)
        return json_response(dict(object="response.input_tokens", input_tokens=made))

    return [
        Route("/v1/responses", GenerationEndpoint(service, responses), methods=["POST"]),
        Route("/v1/responses/input_tokens", count, methods=["POST"]),
    ]


class Answer:
    """The answer to one request. with_logprobs: whether it reports log-probabilities of its text's tokens."""

    def __init__(self, generation: Generation, fields, new_parser, with_logprobs: bool = False) -> None:
        self._generation, self._request = generation, generation.requests[0]
        self._with_logprobs, self._parser = (
            with_logprobs,
            TokenSpanParser(new_parser()) if with_logprobs else new_parser(),
        )
        self._number, self._ids = 0, {}
        self._head = dict(
            id=f"resp_{generation.exchange.id}",
            object="response",
            created_at=int(time.time()),
            model=generation.model_name,
            **_echoed(fields, self._request.params),
        )

    def whole(self, tokens):
        """The response object. tokens: all Tokens of the answer."""
        found = self._read(tokens) + self._parser.finish(self._request.finish_reason == "length")
        return self._response(collect(found))

    def _read(self, tokens):
        return self._parser.push(tokens if self._with_logprobs else "".join([token.text for token in tokens]))

    async def events(self):
        """Yields the events of a stream, the events of one step as one piece of bytes."""
        blocks = Blocks()
        started = self._head | dict(status="in_progress", output=[], usage=None, incomplete_details=None)
        yield self._event("response.created", response=started) + self._event("response.in_progress", response=started)
        try:
            async for ((_, tokens, reason),) in self._generation.tokens():
                found = self._read(tokens) + (self._parser.finish(reason == "length") if reason else [])
                made = [self._change(*change) for change in blocks.add(found)]
                if reason:
                    made += [self._change(*change, reason == "length") for change in blocks.close()]
                yield b"".join(made)
        except ClientDisconnect:
            raise
        except Exception as error:
            yield self._failed(started, self._generation.explain(error))
            return
        response = self._response(blocks.all)
        yield self._event(f"response.{response['status']}", response=response)

    def _failed(self, started, error):
        shaped = openai_shape(error)["error"]
        problem = dict(code=shaped["code"] or shaped["type"], message=shaped["message"])
        return self._event("response.failed", response=started | dict(status="failed", error=problem))

    def _event(self, name, **fields):
        made = named_event(name, dict(type=name, sequence_number=self._number, **fields))
        self._number += 1
        return made

    def _change(self, change, block, event, is_cut: bool = False):
        """The events for a change of a Block, see `Blocks.add`. is_cut: the answer reached its limit in this block."""
        place = dict(item_id=self._id(block), output_index=block.index)
        part = place if block.kind == "call" else place | dict(content_index=0)
        tokens = event.tokens if change == "piece" and block.kind == "text" else block.tokens
        logprobs = dict(logprobs=self._logprobs(tokens)) if block.kind == "text" else {}
        if change == "piece":
            return self._event(f"{PIECES[block.kind]}.delta", **part, delta=event.text, **logprobs)
        if change == "open":
            item = self._item(block, "in_progress")
            made = self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                made += self._event("response.content_part.added", **part, part=self._part(block, True))
            return made
        key = "arguments" if block.kind == "call" else "text"
        made = self._event(f"{PIECES[block.kind]}.done", **part, **{key: block.text}, **logprobs)
        if block.kind != "call":
            made += self._event("response.content_part.done", **part, part=self._part(block))
        item = self._item(block, ITEM_STATUS[is_cut or block.is_cut])
        return made + self._event("response.output_item.done", output_index=block.index, item=item)

    # ------------------------------------------------------------ the response object

    def _response(self, blocks):
        is_cut = self._request.finish_reason == "length"
        return self._head | dict(
            status="incomplete" if is_cut else "completed",
            usage=self._usage(blocks),
            output=[
                self._item(block, ITEM_STATUS[(is_cut and block is blocks[-1]) or block.is_cut]) for block in blocks
            ],
            incomplete_details=dict(reason="max_output_tokens") if is_cut else None,
            **self._generation.receipt(0),
        )

    def _item(self, block, status):
        """A Block as an item of the output."""
        made, is_new = dict(id=self._id(block), status=status), status == "in_progress"
        if block.kind == "call":
            return made | dict(
                type="function_call",
                call_id=f"call_{block.call.id}",
                name=block.call.name,
                arguments="" if is_new else block.text,
            )
        content = [] if is_new else [self._part(block)]
        if block.kind == "thought":
            return made | dict(type="reasoning", summary=[], content=content)
        return made | dict(type="message", role="assistant", content=content)

    def _part(self, block, is_new: bool = False):
        made = dict(type=PARTS[block.kind], text="" if is_new else block.text)
        if block.kind != "text":
            return made
        return made | dict(annotations=[], logprobs=[] if is_new else self._logprobs(block.tokens))

    def _logprobs(self, tokens):
        tokenizer = text_tokenizer(self._generation.service)
        return in_parts(
            len(tokens),
            lambda start, end: [
                token_logprob(tokenizer, token.id, token.logprob, token.top_logprobs) for token in tokens[start:end]
            ],
        )

    def _id(self, block):
        prefix = dict(text="msg", thought="rs", call="fc")[block.kind]
        return self._ids.setdefault(block.index, f"{prefix}_{secrets.token_hex(16)}")

    def _usage(self, blocks):
        usage, tokenizer = self._generation.usage(), text_tokenizer(self._generation.service)
        thoughts = [block.text for block in blocks if block.kind == "thought"]
        num_thought = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in thoughts)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return dict(
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            total_tokens=usage["total_tokens"],
            input_tokens_details=dict(cached_tokens=cached, cache_write_tokens=0),
            output_tokens_details=dict(reasoning_tokens=num_thought),
        )


def _echoed(fields, params):
    """The fields of the request that the response repeats. params: its SamplingParams."""
    dump = fields.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(
        error=None,
        instructions=fields.instructions,
        metadata=fields.metadata or {},
        tools=dump.get("tools", []),
        tool_choice=dump.get("tool_choice", "auto"),
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        temperature=params.temperature if fields.temperature is None else fields.temperature,
        top_p=params.top_p if fields.top_p is None else fields.top_p,
        max_output_tokens=fields.max_output_tokens,
        top_logprobs=fields.top_logprobs or 0,
        text=dump.get("text", dict(format=dict(type="text"))),
        reasoning=dict(effort=dump.get("reasoning", {}).get("effort"), summary=None),
        previous_response_id=None,
        store=False,
        background=False,
        truncation="disabled",
    )
