"""Token ids of a body's prompts: strings, arrays of strings, token ids or arrays of token ids."""

from collections.abc import Sequence

from lockstep.serve.errors import bad_request, check_most, wrong_field
from lockstep.serve.fields.body import integral, shown
from lockstep.serve.service import Service
from lockstep.text.tokenizer.tokenizer import Tokenizer

STRING_OR_IDS = "a string, an array of strings, an array of token ids or an array of such arrays"


def read_prompts(
    service: Service,
    prompt,
    add_special_tokens: bool,
    max_tokens: int | None,
    field: str = "prompt",
    keep_end: bool = True,
) -> tuple[list[str | None], list[list[int]]]:
    """(texts, lists of token ids) of the prompts in a field of the body, in any of the forms of STRING_OR_IDS.

    The text of a prompt that was given as ids, or was truncated, is None. max_tokens: tokens to keep of each prompt,
    None for all; keep_end: whether truncation keeps the end of a prompt or its beginning; field: the name of the field
    in errors. ApiError 400.
    """
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    check_most(field, len(prompts), service.limits.max_prompts, f"{field}s")
    texts, kept = [], []
    for each in prompts:
        ids = _ids(service, each, add_special_tokens, max_tokens is not None, field)
        kept.append(ids if max_tokens is None else shortened(service, each, ids, max_tokens, keep_end))
        texts.append(each if isinstance(each, str) and len(kept[-1]) == len(ids) else None)
    return texts, kept


def _is_ids(prompt) -> bool:
    return not prompt or isinstance(prompt[0], (int, float))


def _ids(service: Service, prompt, add_special_tokens: bool, may_be_cut: bool, field: str) -> list[int]:
    if isinstance(prompt, str):
        max_tokens = service.max_counted if may_be_cut else service.max_context
        ids = text_tokenizer(service, field).encode(prompt, add_special_tokens, max_tokens)
    elif isinstance(prompt, list):
        ids = check_ids(service, prompt, field)
    else:
        raise wrong_field(field, f"expected {STRING_OR_IDS}, got {shown(prompt)}", "invalid_type")
    if not ids:
        raise wrong_field(field, "expected at least one token, got none")
    return ids


def text_tokenizer(service: Service, field: str = "prompt") -> Tokenizer:
    """The model's tokenizer. ApiError 400 where it has none."""
    if service.tokenizer is None:
        raise bad_request(f"this model has no tokenizer: {field}s must be arrays of token ids", field, "no_tokenizer")
    return service.tokenizer


def check_ids(service: Service, ids: Sequence[float], where: str) -> list[int]:
    """The token ids as integers. ApiError 400 for an id that the model does not have; where: its field."""
    checked, vocab_size = [], service.vocab_size
    for token_id in map(integral, ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise wrong_field(where, f"expected token ids from 0 to {vocab_size - 1}, got {shown(token_id)}")
        checked.append(token_id)
    return checked


def shortened(service: Service, given, ids: list[int], max_tokens: int, keep_end: bool) -> list[int]:
    """At most `max_tokens` of a prompt's ids: special tokens that the tokenizer put around a text stay, its content is
    cut.

    given: the prompt as the body has it, text or ids; keep_end: whether to keep the end of the content, or its
    beginning. ApiError 400 where nothing of the content would be left.
    """
    if len(ids) <= max_tokens:
        return ids
    before, after = _num_special_around(text_tokenizer(service), given, ids) if isinstance(given, str) else (0, 0)
    left = max_tokens - before - after
    if left < 1:
        raise wrong_field(
            "truncate_prompt_tokens",
            f"expected more than the {before + after} tokens that are put around a text, got {max_tokens}",
        )
    content = ids[before : len(ids) - after]
    kept = content[-left:] if keep_end else content[:left]
    return ids[:before] + kept + ids[len(ids) - after :]


def _num_special_around(tokenizer: Tokenizer, text: str, ids: list[int]) -> tuple[int, int]:
    """How many special tokens the tokenizer put before and after a text's own, such as the one that begins a text."""
    content = tokenizer.encode(text, add_special_tokens=False)
    for before in range(len(ids) - len(content) + 1):
        if ids[before : before + len(content)] == content:
            return before, len(ids) - len(content) - before
    return 0, 0
