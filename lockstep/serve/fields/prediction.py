"""OpenAI's `prediction`: a text that the answer is likely to resemble, such as a file that the model edits."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from lockstep.serve.errors import bad_request, check_most
from lockstep.serve.fields.body import Fields, Items, SimpleOr

if TYPE_CHECKING:
    from lockstep.serve.service import Service


class PredictedPart(Fields):
    """A part of the predicted text."""

    type: Literal["text"]
    text: str


def _text_or_parts(content: Any) -> Any:
    """The content, if it is a string or an array; ValueError for anything else."""
    if not isinstance(content, (str, list)):
        raise ValueError("expected a string or an array of text parts")
    return content


class PredictionFields(Fields):
    """The predicted text, whole or in parts."""

    type: Literal["content"]
    content: Annotated[SimpleOr[str, Items[PredictedPart]], BeforeValidator(_text_or_parts)]

    @property
    def text(self) -> str:
        """The whole predicted text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def predicted_ids(service: "Service", prediction: PredictionFields | None) -> list[int]:
    """The predicted text's token ids. ApiError 400 for more than the context. It tokenizes, which may take a while."""
    if prediction is None:
        return []
    if service.tokenizer is None:
        raise bad_request("prediction: this model has no tokenizer to read it with", "prediction", "no_tokenizer")
    try:
        ids = service.tokenizer.encode(prediction.text, add_special_tokens=False, max_tokens=service.max_context)
    except ValueError as error:
        raise bad_request(f"prediction: {error}", "prediction", "invalid_value") from None
    check_most("prediction", len(ids), service.max_context, "tokens, as many as the context")
    return ids
