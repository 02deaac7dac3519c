"""The fields that ask for a stream, as in OpenAI's API and vLLM's, and the usage that chunks report."""

from typing import ClassVar, Self

from pydantic import model_validator

from lockstep.serve.answers.json_response import to_text
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields
from lockstep.serve.fields.known import STREAM, KnownFields


class StreamOptions(Fields):
    """Whether a stream reports its usage: at its end, and with continuous_usage_stats in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StreamFields(Fields):
    """Whether the answer is streamed. ApiError 400 for stream_options without stream."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong_field("stream_options", "expected stream to be true, too")
        return self

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with a chunk that reports its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def is_continuous(self) -> bool:
        """Whether every chunk of a stream reports the usage so far."""
        return self.streams_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class NamedEventStreamOptions(KnownFields):
    """The options of a stream of /v1/responses or /v1/messages, whose named events always end with the usage."""

    refused: ClassVar = STREAM
    inside: ClassVar = "stream_options."

    include_usage: bool | None = None


class NamedEventStreamFields(StreamFields):
    """StreamFields of /v1/responses and /v1/messages."""

    stream_options: NamedEventStreamOptions | None = None


class ChunkEnd:
    """The end of each chunk's JSON, with the usage of one of the engine's requests where StreamFields ask for it."""

    def __init__(self, fields: StreamFields, request) -> None:
        self._num_prompt = len(request.prompt_ids)
        self._is_continuous = fields.is_continuous
        self._fixed = '}],"usage":null}\n\n' if fields.streams_usage else "}]}\n\n"

    def after(self, num_output: int) -> str:
        """The end of the chunk after which `num_output` tokens of the answer have been sent."""
        if not self._is_continuous:
            return self._fixed
        usage = dict(
            prompt_tokens=self._num_prompt, completion_tokens=num_output, total_tokens=self._num_prompt + num_output
        )
        return f'}}],"usage":{to_text(usage)}}}\n\n'
