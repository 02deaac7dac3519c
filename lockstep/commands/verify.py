"""`lockstep verify`: whether the answer of a receipt is the model's, bit for bit."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.commands.generate import read_text
from lockstep.commands.options import PlanFile, Threads, load
from lockstep.commands.terminal.output import shown
from lockstep.commands.terminal.receipts import told
from lockstep.receipts.verdict import FALSE, TRUE

if TYPE_CHECKING:
    from lockstep.llm import LLM
    from lockstep.receipts.answers import Answered
    from lockstep.receipts.envelope import Envelope
    from lockstep.receipts.keys import PublicKey
    from lockstep.receipts.statement import Statement
    from lockstep.receipts.verdict import Verdict
    from lockstep.receipts.verify import Given


def command(
    receipt: Annotated[
        str,
        typer.Argument(metavar="RECEIPT", help="A file with a receipt, many, a batch or an API's answer; or -."),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default="the bundled model", help="The model that made the answer."),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The JSON that was sent: the receipt has to be of this request.",
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(metavar="FILE", show_default=False, help="JSON with the answer's token_ids: they are compared."),
    ] = None,
    receipts: Annotated[
        str | None, typer.Option(metavar="FILE", show_default=False, help="The receipts of a batch, one on each line.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE", show_default=False, help="The public key by which the receipt has to be signed."),
    ] = None,
    salt: Annotated[
        str | None, typer.Option(metavar="HEX", show_default=False, help="The salt of a prompt that the receipt hides.")
    ] = None,
    plan: PlanFile = None,
    threads: Threads = None,
) -> None:
    """Verify that the model gives the answer of a receipt: the same tokens, log-probabilities and hidden states, bit
    for bit, and the same end. One prefill of prompt and answer does it, in a fraction of the time of the answer.

    The exit status is 0 if it is true, 1 if it is false (what is wrong is said), 2 if it cannot be checked here.
    """
    from lockstep.receipts.answers import answered
    from lockstep.receipts.envelope import BATCH
    from lockstep.receipts.keys import load_public_key
    from lockstep.receipts.statement import from_bytes

    public = None if key is None else load_public_key(key)
    given = read_given(answer, salt)
    body = None if request is None else Path(request).read_bytes()
    found, codes = answered(read_text(receipt)), []
    if any(each.envelope.type == BATCH for each in found):
        if len(found) > 1:
            raise ValueError(f"{receipt}: expected a batch alone in its file, got {len(found)} envelopes")
        batch, found = found[0].envelope, [] if receipts is None else answered(read_text(receipts))
        codes = [check_batch(batch, found, public)]
        public = None  # the batch's signature stands for those of its receipts
    statements = [from_bytes(each.envelope.payload) for each in found]
    with loaded(model, statements, plan=plan, threads=threads) as llm:
        for each, statement in zip(found, statements, strict=True):
            codes.append(check_one(llm, each, statement, given, body, public))
    raise typer.Exit(FALSE if FALSE in codes else max(codes))


def check_batch(batch: "Envelope", receipts: "Sequence[Answered]", public: "PublicKey | None") -> int:
    """Prints whether a batch is the one of these receipts, and signed; returns the exit status."""
    from lockstep.receipts.batch import batch_of, read_batch

    claimed = read_batch(batch)
    if not receipts:
        raise ValueError(f"this is a batch of {claimed.num_answers} receipts: expected --receipts FILE, too")
    if public is not None and not batch.is_signed_by(public):
        return say(FALSE, f"false: the batch is not signed by key {public.id}")
    found = batch_of([each.envelope for each in receipts])
    if found.num_answers != claimed.num_answers:
        return say(FALSE, f"false: the batch is of {claimed.num_answers} receipts, the file has {found.num_answers}")
    if found.root != claimed.root:
        return say(FALSE, "false: the receipts, or their order, are not those of the batch")
    return say(TRUE, f"true: the batch of {claimed.num_answers} receipts{signed_words(batch, public)}")


def loaded(name: str | None, statements: Sequence["Statement"], **options: Any) -> "LLM":
    """The model, in the formats of the receipts. No name inside of a receipt is used to find it. ValueError for
    receipts of several formats."""
    [*formats] = {(statement.model.weights, statement.model.kv_dtype) for statement in statements}
    if len(formats) > 1:
        raise ValueError("the receipts are of models in several formats: expected files with those of one each")
    most = max(s.prompt.tokens + s.answer.tokens for s in statements)
    options |= dict(weights=formats[0][0], kv_dtype=formats[0][1], needed_context=max(4096, -(-most // 64) * 64))
    return load(name, prefix_cache=False, wait_for_content=True, **options)


def check_one(
    llm: "LLM",
    found: "Answered",
    statement: "Statement",
    given: "Given",
    body: bytes | None,
    public: "PublicKey | None",
) -> int:
    """Prints what verifying a receipt finds; returns the exit status. body: of the request that was sent, or None."""
    if public is not None and not found.envelope.is_signed_by(public):
        return say(FALSE, f"false: the receipt is not signed by key {public.id}")
    known = given if given.output_ids is not None else given._replace(output_ids=found.token_ids)
    verdict = verdict_of(llm, found, statement, known, body)
    signed = signed_words(found.envelope, public) if verdict.is_true else ""
    if verdict.is_true and found.is_within and found.text is None:
        signed += "; the text around it was not compared with its tokens"
    return say(verdict.code, told(verdict, statement) + signed)


def verdict_of(
    llm: "LLM", found: "Answered", statement: "Statement", given: "Given | Verdict", body: bytes | None
) -> "Verdict":
    """The Verdict on a receipt, compared with the request, where that is given."""
    from lockstep.receipts.verify import Given

    if body is not None and isinstance(given, Given) and llm.verifier.is_of_model(statement):
        from lockstep.serve.receipts.asked import with_request

        given = with_request(llm, llm.chat_model if llm.has_tokenizer else None, body, statement, given)
    if not isinstance(given, Given):
        return given
    verdict, prompt = llm.verify(found.envelope, given), statement.prompt.ids or given.prompt_ids
    return found.with_text(verdict, llm.tokenizer.decode(prompt) if prompt and llm.has_tokenizer else "")


def read_given(answer: str | None, salt: str | None) -> "Given":
    """What the command line gives beside the receipt."""
    from lockstep.receipts.answers import token_ids_in
    from lockstep.receipts.statement import salt_of
    from lockstep.receipts.verify import Given

    return Given(
        output_ids=None if answer is None else token_ids_in(read_text(answer)),
        salt=None if salt is None else salt_of(salt),
    )


def signed_words(envelope: "Envelope", public: "PublicKey | None") -> str:
    """By whom an envelope is signed, in words."""
    if public is not None:
        return f"; signed by key {public.id}"
    if envelope.signatures:
        return f"; signed by key {envelope.signatures[0].key_id}, which was not checked (--key)"
    return ""


def say(code: int, line: str) -> int:
    """Prints a line, in which what a receipt says cannot make another; returns the code."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(shown(printable, sys.stdout), file=sys.stdout, flush=True)
    return code
