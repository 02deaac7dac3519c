"""What holds an answer to a form, as a receipt has it: grammars, allowed tokens, banned words. From it the same mask is
made again."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import Fields, is_token, reading
from lockstep.receipts.text_sizes import MAX_BANNED, MAX_FORMS, MAX_GRAMMAR_CHARS, MAX_TOKEN_IDS
from lockstep.text.grammars.mask import GrammarMask
from lockstep.text.grammars.structured import Grammars
from lockstep.text.speculative_mask import SpeculativeMask
from lockstep.text.token_masks import TokenMask, UntilComplete

PLACES = ("trigger", "after", "before")  # tokens between which a grammar holds
LIBRARY = f"llguidance {importlib.metadata.version('llguidance')}"
Form = dict[str, Any]


def form_of(mask: Any) -> Form | None:
    """The form of a `SamplingParams.logits_mask`, as JSON has it; None without a mask. ReceiptError for a function of
    the caller's own, which nobody else could call."""
    if mask is None:
        return None
    if isinstance(mask, GrammarMask) and mask.grammar:
        places = {name: getattr(mask, name) for name in PLACES}
        known = {name: token for name, token in places.items() if token is not None}
        return dict(grammar=mask.grammar, **known, **(dict(once=True) if mask.once else {}), library=LIBRARY)
    if isinstance(mask, TokenMask):
        tokens: Form = {} if mask.allowed is None else dict(allowed=list(mask.allowed))
        tokens |= dict(banned=[list(ids) for ids in mask.banned], ends=list(mask.ends))
        return dict(tokens=tokens, **_inside(mask.other))
    if isinstance(mask, UntilComplete):
        return dict(until_complete=form_of(mask.other))
    raise ReceiptError(
        "receipt: expected a form that others can make, too (a schema, regex, grammar, tools, allowed or banned "
        "tokens), got a logits_mask of your own"
    )


def _inside(mask: SpeculativeMask | None) -> Form:
    return {} if mask is None else dict(inside=form_of(mask))


def without_texts(form: Form | None) -> Form | None:
    """The form with the SHA-256 of grammars in place of their texts."""
    if form is None:
        return None
    made: Form = {}
    for name, part in form.items():
        if name == "grammar":
            made["grammar_sha256"] = hashlib.sha256(part.encode()).hexdigest()
        else:
            made[name] = without_texts(part) if name in ("inside", "until_complete") else part
    return made


def check_form(form: Any, depth: int = 0) -> Form:
    """The form of a receipt, if it is one. ReceiptError for anything else."""
    if depth > MAX_FORMS:
        raise ReceiptError(f"form: expected at most {MAX_FORMS} masks inside of one another")
    with reading(form, "form.") as fields:
        if "tokens" in fields:
            _check_tokens(fields.take("tokens"))
            if "inside" in fields:
                check_form(fields.take("inside"), depth + 1)
        elif "until_complete" in fields:
            check_form(fields.take("until_complete"), depth + 1)
        else:
            _check_grammar(fields)
    return form


def _check_grammar(fields: Fields) -> None:
    if "grammar_sha256" in fields:
        fields.hex("grammar_sha256", 32)
    else:
        fields.text("grammar", MAX_GRAMMAR_CHARS)
    for name in PLACES:
        if name in fields:
            fields.integer(name, 0, (1 << 31) - 1)
    if "once" in fields and not fields.boolean("once"):
        fields.refuse("once", "expected true or no such field, got false")
    fields.text("library", 80)


def _check_tokens(value: Any) -> None:
    with reading(value, "form.tokens.") as fields:
        if "allowed" in fields:
            fields.items("allowed", MAX_TOKEN_IDS, is_token, "token ids")
        fields.items("ends", MAX_TOKEN_IDS, is_token, "token ids")
        fields.items("banned", MAX_BANNED, _is_sequence, "lists of token ids")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_BANNED and all(map(is_token, value))


def has_texts(form: Form | None) -> bool:
    """Whether the texts of a form's grammars are there."""
    if form is None:
        return True
    inside = form.get("inside", form.get("until_complete"))
    return "grammar_sha256" not in form and has_texts(inside)


def libraries(form: Form | None) -> set[str]:
    """The libraries that read a form's grammars, with their versions."""
    if form is None:
        return set()
    own = {form["library"]} if "library" in form else set()
    return own | libraries(form.get("inside", form.get("until_complete")))


def tokens_of(form: Form | None) -> list[int]:
    """The tokens that a checked form names."""
    if form is None:
        return []
    own = [form[name] for name in PLACES if name in form]
    if "tokens" in form:
        part = form["tokens"]
        own += [*part.get("allowed", ()), *part["ends"], *(token for ids in part["banned"] for token in ids)]
    return own + tokens_of(form.get("inside", form.get("until_complete")))


def mask_of(
    form: Form | None, grammars: Grammars | None, vocab_size: int, eos_ids: Iterable[int]
) -> SpeculativeMask | None:
    """The mask of a checked form whose texts are there, and whose tokens (`tokens_of`) are of the vocabulary; None for
    no form. ValueError for a grammar that does not compile here."""
    if form is None:
        return None
    if "until_complete" in form:
        other = mask_of(form["until_complete"], grammars, vocab_size, eos_ids)
        if other is None:
            raise ReceiptError("form.until_complete: expected a form, got none")
        return UntilComplete(other, vocab_size, eos_ids)
    if "tokens" in form:
        allowed, banned, ends = (form["tokens"].get(name) for name in ("allowed", "banned", "ends"))
        return TokenMask(vocab_size, allowed, banned, mask_of(form.get("inside"), grammars, vocab_size, eos_ids), ends)
    if grammars is None:
        raise ReceiptError("form.grammar: the model has no tokenizer here that could read it")
    places: dict[str, Any] = {name: form.get(name) for name in PLACES}
    return grammars.mask(form["grammar"], once=form.get("once", False), **places)
