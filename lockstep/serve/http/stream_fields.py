"""The fields that ask for a stream, as OpenAI has them."""
from typing import ClassVar, Self

from pydantic import model_validator

from lockstep.serve.http.body import Fields
from lockstep.serve.http.errors import bad_request
from lockstep.serve.http.known_fields import STREAM, KnownFields


class StreamOptions(KnownFields):
    """What a stream has besides the answer."""

    refused: ClassVar = STREAM
    inside: ClassVar = "stream_options."

    include_usage: bool | None = None


class StreamFields(Fields):
    """Whether the answer comes as a stream. ApiError 400 for options of a stream that is not asked for."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: expected stream to be true, too", "stream_options", "invalid_value")
        return self

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
