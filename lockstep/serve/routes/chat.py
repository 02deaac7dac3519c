"""/v1/chat/completions: the next message of a conversation, as OpenAI's API has it."""

import time
from typing import Any

from starlette.routing import Route

from lockstep.serve.answers.json_response import fields_text, to_text
from lockstep.serve.answers.logprobs import all_chat_logprobs, chat_logprobs, check_prompt_logprobs, prompt_logprobs
from lockstep.serve.answers.sse import EventStream, data_event, json_answer
from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.chat import ChatFields, conversation
from lockstep.serve.fields.prompts import text_tokenizer
from lockstep.serve.fields.stream import ChunkEnd
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.limits import Limits
from lockstep.serve.routes import conversation_routes
from lockstep.serve.service import Service
from lockstep.text.reasoning import PlainParser
from lockstep.text.tool_calls.events import Arguments, CallStart, Content, Reasoning


def routes(service: Service):
    async def chat(generation: Generation):
        fields = await generation.read(ChatFields)
        logprobs = _logprobs(fields, service.limits)
        check_prompt_logprobs(fields)
        _check_generation_prompt(fields)
        reports = dict(logprobs=logprobs, prompt_logprobs=fields.prompt_logprobs)
        new_parser = await conversation_routes.start(generation, fields, conversation, **reports)
        answer = Answer(generation, fields, new_parser)
        if fields.stream:
            return EventStream(generation, answer.events())
        await generation.finished()
        is_quick = logprobs is fields.prompt_logprobs is None and not fields.tools
        return await json_answer(generation, answer.whole, is_quick)

    return [Route("/v1/chat/completions", GenerationEndpoint(service, chat), methods=["POST"])]


def _check_generation_prompt(fields) -> None:
    """ApiError 400 for add_generation_prompt false, except with continue_final_message: vLLM's clients send both."""
    if fields.add_generation_prompt is False and not fields.continue_final_message:
        raise wrong_field(
            "add_generation_prompt", "expected true or none without continue_final_message, got false", "unsupported"
        )


def _logprobs(fields, limits: Limits):
    """The number of alternatives to report for each token; None for no log-probabilities."""
    if fields.top_logprobs and not fields.logprobs:
        raise wrong_field("top_logprobs", "expected logprobs to be true, too")
    check_most("top_logprobs", fields.top_logprobs or 0, limits.max_logprobs)
    return (fields.top_logprobs or 0) if fields.logprobs else None


class Answer:
    """The answer to one request. new_parser: makes a parser for the text of one sample."""

    def __init__(self, generation: Generation, fields, new_parser) -> None:
        self.generation, self.fields, self.new_parser = generation, fields, new_parser
        service = generation.service
        self.tokenizer = text_tokenizer(service)
        self._head = dict(
            id=f"chatcmpl-{generation.exchange.id}",
            created=int(time.time()),
            model=generation.model_name,
            **service.fingerprint_field,
        )

    def head(self, object_name):
        """The fields that all JSON objects of the answer have."""
        return dict(object=object_name, **self._head)

    # ------------------------------------------------------------ whole

    def whole(self):
        """The response object; arrays that may be long are Parts."""
        choices = [self._choice(number, request) for number, request in enumerate(self.generation.requests)]
        made: dict[str, Any] = self.head("chat.completion") | dict(choices=choices, usage=self.generation.usage())
        if self.fields.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self.generation.requests[0])
        if self.fields.return_token_ids:
            made["prompt_token_ids"] = self.generation.requests[0].prompt_ids
        return made

    def _choice(self, number, request):
        events = conversation_routes.read_all(self.new_parser, request)
        reason = conversation_routes.finish_reason(request, conversation_routes.count_calls(events))
        made = dict(index=number, message=message(events), logprobs=None, finish_reason=reason)
        if self.fields.logprobs:
            made["logprobs"] = all_chat_logprobs(self.tokenizer, request)
        if self.fields.return_token_ids:
            made["token_ids"] = request.output_ids
        return made | self.generation.receipt(number)

    # ------------------------------------------------------------ in chunks

    async def events(self):
        """Yields the chunks of a stream, the chunks of one step as one piece of bytes."""
        sequences = [Chunks(self, number) for number in range(len(self.generation.requests))]
        async for found in self.generation.tokens():
            yield b"".join([sequences[number].chunks(tokens, reason) for number, tokens, reason in found])
        if self.fields.streams_usage:
            yield data_event(self.head("chat.completion.chunk") | dict(choices=[], usage=self.generation.usage()))


def message(events):
    """The assistant's message of a parser's events."""
    text = "".join([event.text for event in events if isinstance(event, Content)])
    thought = "".join([event.text for event in events if isinstance(event, Reasoning)])
    made: dict[str, Any] = dict(role="assistant", content=text, refusal=None)
    if thought:
        made["reasoning_content"] = thought
    calls: list[dict[str, Any]] = [_call(event) for event in events if isinstance(event, CallStart)]
    for event in events:
        if isinstance(event, Arguments):
            calls[event.index]["function"]["arguments"] += event.text
    if calls:
        made |= dict(content=text or None, tool_calls=calls)
    return made


def _call(event):
    return dict(id=event.id, type="function", function=dict(name=event.name, arguments=""))


def delta(event):
    """An event as the delta of a chunk."""
    if isinstance(event, Content):
        return dict(content=event.text)
    if isinstance(event, Reasoning):
        return dict(reasoning_content=event.text)
    if isinstance(event, CallStart):
        return dict(tool_calls=[dict(index=event.index, **_call(event))])
    return dict(tool_calls=[dict(index=event.index, function=dict(arguments=event.text))])


class Chunks:
    """The chunks of one sample. Their common fields are encoded once."""

    def __init__(self, answer, number) -> None:
        self._answer, self._number, self._parser = answer, number, answer.new_parser()
        self._request = answer.generation.requests[number]
        self._is_plain = isinstance(self._parser, PlainParser)
        head = to_text(answer.head("chat.completion.chunk"))[:-1]
        self._before = f'data: {head},"choices":[{{"index":{number},"delta":'
        self._end = ChunkEnd(answer.fields, self._request)
        # the client has the tokens with which the answer began, and what the parser made of them
        self._num_sent, self._begun = self._request.num_given, False
        known = self._parser.push(self._request.text[: self._request.num_given_characters])
        self._num_calls = conversation_routes.count_calls(known)

    def chunks(self, tokens, reason):
        """The chunks for new tokens; empty where the parser still holds their text back."""
        text = "".join([token.text for token in tokens])
        deltas = self._plain(text) if self._is_plain else self._parsed(text, reason)
        if not tokens:  # those with which the answer began end it
            deltas = []
        made = [] if self._begun else [self._chunk('{"role":"assistant","content":""}')]
        self._begun = True
        details = self._details(tokens)
        if details and not deltas:
            deltas = ["{}"]
        for each in deltas:
            made.append(self._chunk(each, details))
            details = ""
        if reason is not None:
            finish = conversation_routes.finish_reason(self._request, self._num_calls)
            receipt = fields_text(self._answer.generation.receipt(self._number))
            made.append(self._chunk("{}", f',"finish_reason":"{finish}"{receipt}'))
        return "".join(made).encode("ascii")

    def _plain(self, text):
        return [f'{{"content":{to_text(text)}}}'] if text else []

    def _parsed(self, text, reason):
        events = self._parser.push(text) if text else []
        if reason is not None:
            events += self._parser.finish(reason == "length")
        self._num_calls = conversation_routes.count_calls(events, self._num_calls)
        return [to_text(delta(event)) for event in events]

    def _chunk(self, encoded_delta, details: str = "") -> str:
        finish = "" if "finish_reason" in details else ',"finish_reason":null'
        return f"{self._before}{encoded_delta}{details}{finish}{self._end.after(self._num_sent)}"

    def _details(self, tokens):
        """JSON fields with the log-probabilities and ids of new tokens, where the request asks for them."""
        fields, start, made = self._answer.fields, self._num_sent, ""
        self._num_sent += len(tokens)
        if fields.logprobs:
            found = chat_logprobs(self._answer.tokenizer, self._request, start, self._num_sent)
            made = f',"logprobs":{to_text(found)}'
        if fields.return_token_ids:
            made += f',"token_ids":{to_text([token.id for token in tokens])}'
        return made
