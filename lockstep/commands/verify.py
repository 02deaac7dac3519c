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

    public = None if key is None else load_public_key(key)
    found = answered(read_text(receipt))
    if any(each.envelope.type == BATCH for each in found) and len(found) > 1:
        raise ValueError(f"{receipt}: expected a batch alone in its file, got {len(found)} envelopes")
    if found[0].envelope.type == BATCH:
        codes = [check_batch(found[0].envelope, receipts, public)]
        found = [] if receipts is None else answered(read_text(receipts))
        public = None  # the batch's signature stands for those of its receipts
    else:
        codes = []
    given = read_given(request, answer, salt)
    codes += check_all(found, model, given, public, plan=plan, threads=threads)
    raise typer.Exit(FALSE if FALSE in codes else max(codes))


def check_batch(batch: "Envelope", receipts: str | None, public: "PublicKey | None") -> int:
    """Prints whether a batch is the one of a file's receipts, and signed; returns the exit status."""
    from lockstep.receipts.batch import batch_of, read_batch
    from lockstep.receipts.envelope import RECEIPT

    claimed = read_batch(batch)
    if receipts is None:
        raise ValueError(f"this is a batch of {claimed.num_answers} receipts: expected --receipts FILE, too")
    if public is not None and not batch.is_signed_by(public):
        return say(FALSE, f"false: the batch is not signed by key {public.id}")
    found = batch_of(envelopes_in(receipts, [RECEIPT]))
    if found.num_answers != claimed.num_answers:
        return say(FALSE, f"false: the batch is of {claimed.num_answers} receipts, the file has {found.num_answers}")
    if found.root != claimed.root:
        return say(FALSE, "false: the receipts, or their order, are not those of the batch")
    return say(TRUE, f"true: the batch of {claimed.num_answers} receipts{signed_words(batch, public)}")


def check_all(
    found: Sequence["Answered"], name: str | None, given: Any, public: "PublicKey | None", **options: Any
) -> list[int]:
    """Prints what verifying each receipt finds; returns their exit statuses. options: of the model."""
    from lockstep.receipts.statement import from_bytes

    statements = [from_bytes(each.envelope.payload) for each in found]
    formats = {(statement.model.weights, statement.model.kv_dtype) for statement in statements}
    if len(formats) > 1:
        raise ValueError("the receipts are of models in several formats: expected files with those of one each")
    llm = loaded(name, statements, **options) if statements else None
    codes = []
    for each, statement in zip(found, statements, strict=True):
        assert llm is not None, "there is a receipt"
        codes.append(check_one(llm, each, statement, given, public))
    if llm is not None:
        llm.close()
    return codes


def loaded(name: str | None, statements: Sequence["Statement"], **options: Any) -> "LLM":
    """The model, in the formats of the receipts. No name inside of a receipt is used to find it."""
    part = statements[0].model
    most = max(s.prompt.tokens + s.answer.tokens for s in statements)
    formats: dict[str, Any] = dict(weights=part.weights, kv_dtype=part.kv_dtype)
    needed = max(4096, -(-most // 64) * 64)
    return load(name, needed_context=needed, prefix_cache=False, wait_for_content=True, **formats, **options)


def check_one(llm: "LLM", found: "Answered", statement: "Statement", given: Any, public: "PublicKey | None") -> int:
    """Prints what verifying a receipt finds; returns the exit status."""
    if public is not None and not found.envelope.is_signed_by(public):
        return say(FALSE, f"false: the receipt is not signed by key {public.id}")
    verdict = verdict_of(llm, found, statement, given)
    signed = signed_words(found.envelope, public) if verdict.is_true else ""
    if verdict.is_true and found.is_within and found.text is None:
        signed += "; the text around it was not compared with its tokens"
    return say(verdict.code, told(verdict, statement) + signed)


def verdict_of(llm: "LLM", found: "Answered", statement: "Statement", given: Any) -> "Verdict":
    """The Verdict on a receipt, compared with the request, where that is given."""
    from lockstep.receipts.verify import Given

    output_ids = given.output_ids if given.output_ids is not None else found.token_ids
    known = Given(output_ids=output_ids, salt=given.salt)
    if given.request is not None and llm.verifier.is_of_model(statement):
        from lockstep.serve.receipts.asked import read_request

        asked = read_request(llm, llm.chat_model if llm.has_tokenizer else None, given.request, statement)
        if (wrong := asked.difference(statement, given.salt)) is not None:
            return wrong
        prompt = asked.prompt_of(statement, given.salt)
        assert prompt is not None, "the receipt is of one of its prompts"
        known = known._replace(prompt_ids=prompt[0], logits_mask=prompt[1].logits_mask)
    verdict = llm.verify(found.envelope, known)
    prompt = statement.prompt.ids or known.prompt_ids
    return found.with_text(verdict, llm.tokenizer.decode(list(prompt)) if prompt and llm.has_tokenizer else "")


def read_given(request: str | None, answer: str | None, salt: str | None) -> Any:
    """What the command line gives beside the receipt."""
    from lockstep.receipts.answers import GivenFiles, token_ids_in
    from lockstep.receipts.statement import SALT_BYTES

    try:
        known = None if salt is None else bytes.fromhex(salt)
    except ValueError:
        known = b""
    if known is not None and len(known) != SALT_BYTES:
        raise ValueError(f"--salt: expected {2 * SALT_BYTES} hexadecimal digits, got {salt!r:.80}")
    return GivenFiles(
        None if request is None else Path(request).read_bytes(),
        None if answer is None else token_ids_in(read_text(answer)),
        known,
    )


def envelopes_in(path: str, types: Sequence[str]) -> "list[Envelope]":
    """The envelopes in a file, one on each line. ValueError that names the line of one that is none."""
    from lockstep.receipts.answers import answered

    found = [each.envelope for each in answered(read_text(path))]
    for number, each in enumerate(found):
        if each.type not in types:
            raise ValueError(f"{path}: number {number} is a batch, expected receipts")
    return found


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
