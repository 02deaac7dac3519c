"""/v1/chat/completions: a conversation goes on."""

import secrets
import time
from typing import Any

from starlette.routing import Route

from lockstep.serve.answers.json_response import to_text
from lockstep.serve.answers.logprobs import chat_logprobs, check_prompt_logprobs, prompt_logprobs, whole_logprobs
from lockstep.serve.answers.sse import EventStream, data, json_answer
from lockstep.serve.errors import check_most, wrong_field
from lockstep.serve.fields.chat import ChatFields, conversation
from lockstep.serve.fields.prompts import text_tokenizer
from lockstep.serve.fields.stream import ChunkEnd
from lockstep.serve.generation import Generates, Job
from lockstep.serve.limits import Limits
from lockstep.serve.routes import conversation_routes as talk
from lockstep.serve.service import Service
from lockstep.text.reasoning import PlainParser
from lockstep.text.tool_calls.events import Arguments, CallStart, Content, Reasoning


def routes(service: Service):
    async def chat(job: Job):
        fields = await job.read(ChatFields)
        logprobs = _logprobs(fields, service.limits)
        check_prompt_logprobs(fields)
        _check_generation_prompt(fields)
        reports = dict(logprobs=logprobs, prompt_logprobs=fields.prompt_logprobs)
        new_parser = await talk.start(job, fields, conversation, **reports)
        answer = Answer(job, fields, new_parser)
        if fields.stream:
            return EventStream(job, answer.events())
        await job.finished()
        is_quick = logprobs is fields.prompt_logprobs is None and not fields.tools
        return await json_answer(job, answer.whole, is_quick)

    return [Route("/v1/chat/completions", Generates(service, chat), methods=["POST"])]


def _check_generation_prompt(fields) -> None:
    """vLLM's clients switch it off where they continue a message, which is all that it can mean here."""
    if fields.add_generation_prompt is False and not fields.continue_final_message:
        raise wrong_field(
            "add_generation_prompt", "expected true or none without continue_final_message, got false", "unsupported"
        )


def _logprobs(fields, limits: Limits):
    """How many alternatives to report for each token; None for no log-probabilities."""
    if fields.top_logprobs and not fields.logprobs:
        raise wrong_field("top_logprobs", "expected logprobs to be true, too")
    check_most("top_logprobs", fields.top_logprobs or 0, limits.max_logprobs)
    return (fields.top_logprobs or 0) if fields.logprobs else None


class Answer:
    """The answer to one request. new_parser: makes what reads the text of one sample."""

    def __init__(self, job: Job, fields, new_parser) -> None:
        self.job, self.fields, self.new_parser = job, fields, new_parser
        service = job.service
        self.tokenizer = text_tokenizer(service)
        self._head = dict(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=job.model_name,
            **service.fingerprint_field,
        )

    def head(self, kind):
        """The fields that all objects of the answer have."""
        return dict(object=kind, **self._head)

    # ------------------------------------------------------------ whole

    def whole(self):
        """The response; arrays that may be long are Parts."""
        choices = [self._choice(number, request) for number, request in enumerate(self.job.requests)]
        made: dict[str, Any] = self.head("chat.completion") | dict(choices=choices, usage=self.job.usage())
        if self.fields.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self.job.requests[0])
        if self.fields.return_token_ids:
            made["prompt_token_ids"] = self.job.requests[0].prompt_ids
        return made

    def _choice(self, number, request):
        events = talk.read_all(self.new_parser, request)
        reason = talk.finish_reason(request, talk.count_calls(events))
        made = dict(index=number, message=message(events), logprobs=None, finish_reason=reason)
        if self.fields.logprobs:
            made["logprobs"] = whole_logprobs(self.tokenizer, request)
        if self.fields.return_token_ids:
            made["token_ids"] = request.output_ids
        return made

    # ------------------------------------------------------------ in chunks

    async def events(self):
        """The chunks of a stream, those of one step together."""
        sequences = [Chunks(self, number) for number in range(len(self.job.requests))]
        async for found in self.job.tokens():
            yield b"".join([sequences[number].chunks(tokens, reason) for number, tokens, reason in found])
        if self.fields.streams_usage:
            yield data(self.head("chat.completion.chunk") | dict(choices=[], usage=self.job.usage()))


def message(events):
    """The assistant's message that events amount to."""
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
    """What an event adds to the message."""
    if isinstance(event, Content):
        return dict(content=event.text)
    if isinstance(event, Reasoning):
        return dict(reasoning_content=event.text)
    if isinstance(event, CallStart):
        return dict(tool_calls=[dict(index=event.index, **_call(event))])
    return dict(tool_calls=[dict(index=event.index, function=dict(arguments=event.text))])


class Chunks:
    """The chunks of one sample. What they have in common is encoded once."""

    def __init__(self, answer, number) -> None:
        self._answer, self._request, self._parser = answer, answer.job.requests[number], answer.new_parser()
        self._is_plain = isinstance(self._parser, PlainParser)
        head = to_text(answer.head("chat.completion.chunk"))[:-1]
        self._before = f'data: {head},"choices":[{{"index":{number},"delta":'
        self._end = ChunkEnd(answer.fields, self._request)
        self._num_sent, self._num_calls, self._begun = 0, 0, False

    def chunks(self, tokens, reason):
        """The events of new tokens; nothing where there is nothing to tell yet."""
        text = "".join([token.text for token in tokens])
        deltas = self._plain(text) if self._is_plain else self._parsed(text, reason)
        made = [] if self._begun else [self._chunk('{"role":"assistant","content":""}')]
        self._begun = True
        details = self._details(tokens)
        if details and not deltas:
            deltas = ["{}"]
        for each in deltas:
            made.append(self._chunk(each, details))
            details = ""
        if reason is not None:
            finish = talk.finish_reason(self._request, self._num_calls)
            made.append(self._chunk("{}", f',"finish_reason":"{finish}"'))
        return "".join(made).encode("ascii")

    def _plain(self, text):
        return [f'{{"content":{to_text(text)}}}'] if text else []

    def _parsed(self, text, reason):
        events = self._parser.push(text) if text else []
        if reason is not None:
            events += self._parser.finish(reason == "length")
        self._num_calls = talk.count_calls(events, self._num_calls)
        return [to_text(delta(event)) for event in events]

    def _chunk(self, encoded_delta, details: str = "") -> str:
        finish = "" if "finish_reason" in details else ',"finish_reason":null'
        return f"{self._before}{encoded_delta}{details}{finish}{self._end.after(self._num_sent)}"

    def _details(self, tokens):
        """Log-probabilities and ids of new tokens, as far as they were asked for."""
        fields, start, made = self._answer.fields, self._num_sent, ""
        self._num_sent += len(tokens)
        if fields.logprobs:
            found = chat_logprobs(self._answer.tokenizer, self._request, start, self._num_sent)
            made = f',"logprobs":{to_text(found)}'
        if fields.return_token_ids:
            made += f',"token_ids":{to_text([token.id for token in tokens])}'
        return made
