"""/tokenize, /detokenize and /tokenizer_info: the model's tokenizer, for clients that count or score tokens.

The shapes are vLLM's, which lm-eval reads.
"""

from typing import Any

from starlette.routing import Route

from lockstep.serve.answers.json_response import json_response, to_json
from lockstep.serve.answers.logprobs import token_text
from lockstep.serve.errors import bad_request
from lockstep.serve.fields.body import Fields, Items, Whole, read_fields
from lockstep.serve.fields.chat import ChatFields, Message, conversation
from lockstep.serve.fields.prompts import check_ids, text_tokenizer
from lockstep.serve.routes import conversation_routes
from lockstep.serve.service import Service


class TokenizeFields(ChatFields):
    """The body of /tokenize: a text, or a conversation as /v1/chat/completions takes it."""

    prompt: str | None = None
    messages: Items[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(Fields):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Items[Whole]


def routes(service: Service):
    async def tokenize(request):
        fields = await read_fields(request, service, TokenizeFields)
        return json_response(await service.offload(tokenized, service, fields))

    async def detokenize(request):
        fields = await read_fields(request, service, DetokenizeFields)
        return json_response(await service.offload(detokenized, service, fields))

    async def info(request):
        service.check_loaded()
        return json_response(tokenizer_info(service))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", info),
    ]


def tokenized(service: Service, fields):
    """The answer of /tokenize as JSON bytes. ApiError 400 unless exactly one of prompt and messages is given."""
    if (fields.prompt is None) == (fields.messages is None):
        raise bad_request("expected either prompt or messages", "prompt", "invalid_value")
    tokenizer = text_tokenizer(service)
    if fields.prompt is not None:
        ids = tokenizer.encode(fields.prompt, fields.add_special_tokens is not False, service.max_counted)
    else:
        prompt = conversation_routes.chat_model(service).prompt(
            conversation(fields), fields.add_generation_prompt is not False
        )
        ids = tokenizer.encode(prompt, False, service.max_counted)
    made: dict[str, Any] = dict(count=len(ids), max_model_len=service.max_context, tokens=ids)
    if fields.return_token_strs:
        made["token_strs"] = [token_text(tokenizer, i) for i in ids]
    return to_json(made)


def detokenized(service: Service, fields):
    """The answer of /detokenize as JSON bytes, with the text of special tokens."""
    ids = check_ids(service, fields.tokens, "tokens")
    return to_json(dict(prompt=text_tokenizer(service).decode(ids, skip_special_tokens=False)))


def tokenizer_info(service: Service):
    """The answer of /tokenizer_info: what a client needs to count and score tokens as the model does."""
    tokenizer = text_tokenizer(service)
    special = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    ids = {f"{name}_id": tokenizer.backend.token_to_id(text or "") for name, text in special.items()}
    template = tokenizer.chat_templates.get("default")
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        vocab_size=tokenizer.vocab_size,
        max_model_len=service.max_context,
        chat_template=template,
        **special,
        **ids,
    )
