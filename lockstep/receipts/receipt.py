"""Makes receipts of answers."""

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.engine.leaves import LEAF_BYTES, Leaves
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.receipts import parameters, strict_json
from lockstep.receipts.envelope import RECEIPT, Envelope, check_type
from lockstep.receipts.envelope import from_bytes as envelope_from_bytes
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import ids_digest, shown
from lockstep.receipts.form import check_form, form_of
from lockstep.receipts.identity import ModelPart
from lockstep.receipts.keys import SigningKey
from lockstep.receipts.merkle import leaf_hashes, root, root_of
from lockstep.receipts.statement import (
    REASONS,
    SALT_BYTES,
    TAG_BYTES,
    AnswerPart,
    PromptPart,
    Statement,
    check_nonce,
    commitment,
)
from lockstep.receipts.statement import from_bytes as statement_from_bytes


@dataclass(frozen=True)
class ReceiptOptions:
    """What a receipt is to have. ValueError (ReceiptError) for a nonce that is not allowed.

    tags: TAG_BYTES for each token, by which a verifier names the first wrong one. is_detached: leave out the tokens and
    the texts of grammars. hides_prompt: a salted commitment takes the place of the prompt. nonce: a text of the
    client's that no other request has, so that an old receipt cannot pass for a new one. endpoint: of the API. key:
    that signs it, see `keys`.
    """

    tags: bool = False
    is_detached: bool = False
    hides_prompt: bool = False
    nonce: str | None = None
    endpoint: str | None = None
    key: SigningKey | None = None

    def __post_init__(self) -> None:
        for name in ("tags", "is_detached", "hides_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise ReceiptError(f"{name}: expected True or False, got {shown(getattr(self, name))}")
        if not (self.key is None or isinstance(self.key, SigningKey)):
            raise ReceiptError(f"key: expected a SigningKey (keys.load_signing_key), got {shown(self.key)}")
        if self.nonce is not None:
            check_nonce(self.nonce)


@dataclass(frozen=True)
class Receipt:
    """A receipt of one answer. salt: of the prompt's commitment, where the prompt is hidden: it is not in the envelope,
    and only who has it can verify it."""

    envelope: Envelope
    salt: bytes | None = None

    def to_bytes(self) -> bytes:
        """The envelope as JSON text, which `verify` reads."""
        return self.envelope.to_bytes()

    def to_fields(self) -> dict[str, Any]:
        """The fields of an answer in JSON that have it, and the salt of a hidden prompt."""
        salt = {} if self.salt is None else dict(receipt_salt=self.salt.hex())
        return dict(receipt=self.envelope.to_object(), **salt)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON text to a file."""
        Path(path).write_bytes(self.to_bytes() + b"\n")


def check_options(options: Any) -> ReceiptOptions:
    """The ReceiptOptions of a caller, who may say True for the usual ones. ReceiptError for anything else."""
    if not (options is True or isinstance(options, ReceiptOptions)):
        raise ReceiptError(f"receipt: expected True, False or ReceiptOptions, got {shown(options)}")
    return ReceiptOptions() if options is True else options


def check_receivable(params: SamplingParams) -> None:
    """ReceiptError for parameters of a request of which no receipt can be made, or only one that nobody could read."""
    form = form_of(params.logits_mask)
    written = strict_json.dumps(dict(sampling=parameters.to_json(params), form=form))
    parameters.from_json(strict_json.loads(written)["sampling"])
    if form is not None:
        check_form(form)


def make_receipt(
    model: ModelPart,
    request: Request,
    params: SamplingParams,
    sample: int = 0,
    options: ReceiptOptions = ReceiptOptions(),
) -> Receipt:
    """The receipt of an answer that has ended. ReceiptError for an answer that failed, or was made without leaves.

    request: with its leaves (`Engine.make`, receipt). params: what was asked for, of all its samples; sample: the
    number of this one.
    """
    salt = secrets.token_bytes(SALT_BYTES) if options.hides_prompt else None
    envelope = Envelope(make_statement(model, request, params, sample, options, salt).to_bytes(), RECEIPT)
    return Receipt(envelope if options.key is None else envelope.signed(options.key), salt)


def make_statement(
    model: ModelPart,
    request: Request,
    params: SamplingParams,
    sample: int,
    options: ReceiptOptions,
    salt: bytes | None = None,
) -> Statement:
    """The Statement of an answer; see `make_receipt`. salt: of the commitment of a hidden prompt."""
    leaves, num_tokens = request.leaves, len(request.output_ids)
    if request.finish_reason not in REASONS:
        raise ReceiptError(f"receipt: expected an answer that has ended, got finish_reason {request.finish_reason!r}")
    if leaves is None or leaves.num_answer != num_tokens:
        raise ReceiptError("receipt: the request was not made with receipt=True")
    nodes = leaf_hashes(leaves.answer, LEAF_BYTES)
    answer = AnswerPart(
        tokens=num_tokens,
        root=root(nodes),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        ids=tuple(request.output_ids),
        tags=b"".join(node[:TAG_BYTES] for node in nodes) if options.tags else None,
    )
    made = Statement(
        numerics=NUMERICS,
        model=model,
        prompt=_prompt_part(request, leaves, salt),
        params=replace(params, logits_mask=None),
        answer=answer,
        sample=sample,
        form=form_of(params.logits_mask),
        endpoint=options.endpoint,
        nonce=options.nonce,
    )
    return made.detached() if options.is_detached else made


def _prompt_part(request: Request, leaves: Leaves, salt: bytes | None) -> PromptPart:
    ids = request.prompt_ids
    tree = None if request.params.prompt_logprobs is None else root_of(leaves.prompt, LEAF_BYTES)
    if salt is not None:
        return PromptPart(len(ids), commitment(salt, ids), is_hidden=True, root=tree)
    return PromptPart(len(ids), ids_digest(ids), ids=tuple(ids), root=tree)


def envelope_of(receipt: Receipt | Envelope | bytes | str) -> Envelope:
    """The envelope of a receipt. ReceiptError for what is none."""
    if isinstance(receipt, Receipt):
        return receipt.envelope
    if isinstance(receipt, Envelope):
        return receipt
    if not isinstance(receipt, (bytes, str)):
        raise ReceiptError(f"expected a receipt or its JSON text, got {receipt!r:.80}")
    return envelope_from_bytes(receipt, [RECEIPT])


def statement_of(receipt: Receipt | Envelope | bytes | str) -> Statement:
    """The Statement of a receipt. ReceiptError for what is none."""
    found = envelope_of(receipt)
    check_type(found, RECEIPT)
    return statement_from_bytes(found.payload)
