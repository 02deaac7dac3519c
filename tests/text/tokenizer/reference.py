"""What sentencepiece and mistral-common make of vocabularies, texts and conversations; both packages are needed."""

import json
from pathlib import Path

import sentencepiece
from mistral_common.protocol.instruct import messages as kinds
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from tests.text.tokenizer import made

KINDS = dict(
    user=kinds.UserMessage, assistant=kinds.AssistantMessage, system=kinds.SystemMessage, tool=kinds.ToolMessage
)


class SentencePiece:
    """sentencepiece, for the bytes of a tokenizer.model."""

    def __init__(self, raw: bytes) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=raw)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class Tekken:
    """mistral-common, for a tekken.json."""

    def __init__(self, path: Path) -> None:
        self.model = Tekkenizer.from_file(path)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def chat_ids(path: Path, messages: list[dict], with_tool: bool) -> list[int]:
    """The tokens of a conversation's prompt. path: a file named as mistral-common wants it."""
    request = ChatCompletionRequest(
        messages=[_message(message) for message in messages], tools=[Tool(**made.TOOL)] if with_tool else None
    )
    return MistralTokenizer.from_file(str(path)).encode_chat_completion(request).tokens


def _message(message: dict) -> kinds.UATS:
    copy = json.loads(json.dumps(message))
    for call in copy.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return KINDS[copy.pop("role")](**copy)
