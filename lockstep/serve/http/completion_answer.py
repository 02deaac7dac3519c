"""The answer of /v1/completions, whole or in chunks."""

import secrets
import time

from lockstep.serve.http.encode import to_text
from lockstep.serve.http.job import Job
from lockstep.serve.http.legacy_logprobs import LegacyLogprobs, joined
from lockstep.serve.http.prompt_logprobs import prompt_logprobs
from lockstep.serve.http.sse import data
from lockstep.serve.http.stream_fields import ChunkEnd


class Answer:
    """The answer to one request. texts: what each prompt was, None for token ids."""

    def __init__(self, job: Job, fields, texts) -> None:
        self.job, self.fields, self._texts = job, fields, texts
        self.tokenizer, self.is_empty = job.service.tokenizer, fields.is_empty
        self.head = dict(
            id=f"cmpl-{secrets.token_hex(12)}",
            object="text_completion",
            created=int(time.time()),
            model=job.model_name,
            **job.service.fingerprint_field,
        )

    def whole(self):
        """The response; arrays that may be long are Parts."""
        choices = [self._choice(number, request) for number, request in enumerate(self.job.requests)]
        return self.head | dict(choices=choices, usage=self._usage())

    def _choice(self, number, request):
        num_output = 0 if self.is_empty else len(request.output_ids)
        text = "" if self.is_empty else request.text
        reason = "length" if self.is_empty else request.finish_reason
        made = dict(index=number, text=self.echoed(number) + text, logprobs=None, finish_reason=reason)
        if self.fields.logprobs is not None:
            made["logprobs"] = LegacyLogprobs(self.tokenizer).whole(request, bool(self.fields.echo), num_output)
        if self.fields.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(self.tokenizer, request)
        if self.fields.return_token_ids:
            made |= dict(prompt_token_ids=request.prompt_ids, token_ids=request.output_ids[:num_output])
        return made

    def logprobs(self, reader, request, start, end):
        """Those of output tokens start .. end, after the prompt's, if it is echoed."""
        if not self.fields.echo or start:
            return reader.output(request, start, end)
        return joined(reader.prompt(request), reader.output(request, start, end))

    def echoed(self, number):
        """What comes before a sequence's own text: its prompt, if that is wanted."""
        if not self.fields.echo:
            return ""
        text = self._texts[number // (self.fields.num_samples)]
        if text is None and self.tokenizer is not None:
            return self.tokenizer.decode(self.job.requests[number].prompt_ids)
        return text or ""

    def _usage(self):
        usage = self.job.usage()
        if self.is_empty:
            usage |= dict(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    async def events(self):
        """The chunks of a stream, those of one step together."""
        sequences = [Chunks(self, number) for number in range(len(self.job.requests))]
        async for found in self.job.tokens():
            yield b"".join([sequences[number].chunk(tokens, reason) for number, tokens, reason in found])
        if self.fields.streams_usage:
            yield data(self.head | dict(choices=[], usage=self._usage()))


class Chunks:
    """The chunks of one sequence. What they have in common is encoded once."""

    def __init__(self, answer, number) -> None:
        self._answer, self._request = answer, answer.job.requests[number]
        self._before = f'data: {to_text(answer.head)[:-1]},"choices":[{{"index":{number},"text":'
        self._end = ChunkEnd(answer.fields, self._request)
        self._echo, self._num_sent = answer.echoed(number), 0
        self._reader = LegacyLogprobs(answer.tokenizer) if answer.fields.logprobs is not None else None

    def chunk(self, tokens, reason):
        """The event of new tokens; nothing where there is nothing to tell yet."""
        if self._answer.is_empty:
            tokens, reason = [], "length"
        text, self._echo = self._echo + "".join([token.text for token in tokens]), ""
        start, self._num_sent = self._num_sent, self._num_sent + len(tokens)
        if not (text or reason or self._reader):
            return b""
        finish = "null" if reason is None else f'"{reason}"'
        return (
            f'{self._before}{to_text(text)},"logprobs":{self._logprobs(start)},"finish_reason":{finish}'
            f"{self._token_ids(tokens)}{self._end.after(self._num_sent)}".encode("ascii")
        )

    def _logprobs(self, start):
        if self._reader is None:
            return "null"
        return to_text(self._answer.logprobs(self._reader, self._request, start, self._num_sent))

    def _token_ids(self, tokens) -> str:
        if not self._answer.fields.return_token_ids:
            return ""
        return f',"token_ids":{to_text([token.id for token in tokens])}'
