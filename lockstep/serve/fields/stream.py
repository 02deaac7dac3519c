"""The fields that ask for a stream, as OpenAI and vLLM have them, and the usage that its chunks report."""

from typing import ClassVar, Self

from pydantic import model_validator

from lockstep.serve.answers.json_response import to_text
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields
from lockstep.serve.fields.known import STREAM, KnownFields


class StreamOptions(Fields):
    """What a stream has besides the answer. continuous_usage_stats: with include_usage, in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StreamFields(Fields):
    """Whether the answer comes as a stream. ApiError 400 for options of a stream that is not asked for."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong_field("stream_options", "expected stream to be true, too")
        return self

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def is_continuous(self) -> bool:
        """Whether every chunk of a stream that ends with its usage tells it, too."""
        return self.streams_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class OwnStreamOptions(KnownFields):
    """The options of a stream whose events are those of another API, which always end with the usage."""

    refused: ClassVar = STREAM
    inside: ClassVar = "stream_options."

    include_usage: bool | None = None


class OwnStreamFields(StreamFields):
    """The same where the events of a stream are those of another API."""

    stream_options: OwnStreamOptions | None = None


class ChunkEnd:
    """The end of a chunk's JSON: its usage, as far as StreamFields ask for it, of one of the engine's requests."""

    def __init__(self, fields: StreamFields, request) -> None:
        self._num_prompt = len(request.prompt_ids)
        self._is_continuous = fields.is_continuous
        self._fixed = '}],"usage":null}\n\n' if fields.streams_usage else "}]}\n\n"

    def after(self, num_output: int) -> str:
        """The end of a chunk with which so many tokens of the answer have been sent."""
        if not self._is_continuous:
            return self._fixed
        usage = dict(
            prompt_tokens=self._num_prompt, completion_tokens=num_output, total_tokens=self._num_prompt + num_output
        )
        return f'}}],"usage":{to_text(usage)}}}\n\n'
