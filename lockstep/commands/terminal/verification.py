"""Verifies the receipts of a file, and says what is found of each in a line."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep.commands.options import load
from lockstep.commands.terminal.output import counted, shown
from lockstep.commands.terminal.texts import read_text
from lockstep.progress import Progress
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.verdict import FALSE, TRUE, UNCHECKED, Verdict

if TYPE_CHECKING:
    from lockstep.llm import LLM
    from lockstep.receipts.around.files import Answered, Unreadable
    from lockstep.receipts.around.shown import Shown
    from lockstep.receipts.envelope import Envelope
    from lockstep.receipts.keys import PublicKey
    from lockstep.receipts.statement import Statement
    from lockstep.receipts.verify import Given

Found = TypeVar("Found")
WORDS = {TRUE: "true", FALSE: "false", UNCHECKED: "not checked"}
# by what cannot be checked: the options that give what is missing
OPTIONS = {"prompt": " (--request, --salt)", "answer": " (--answer)", "form": " (--request)"}


@dataclass(frozen=True)
class Files:
    """What the command line names. path: of the file with receipts. None: not given."""

    path: str
    request: str | None = None
    answer: str | None = None
    receipts: str | None = None
    key: str | None = None
    salts: tuple[str, ...] = ()


@dataclass
class Item:
    """One receipt to be verified. body: of the request that was sent, or None."""

    found: "Answered"
    statement: "Statement"
    given: "Given"
    body: bytes | None = None


def of_file(found: Callable[[str], Found], path: str) -> Found:
    """found(the text of a file). ReceiptError, which names the file, for a text that found raises one for."""
    try:
        return found(read_text(path))
    except ReceiptError as error:
        raise ReceiptError(f"{path}: {error}") from error.__cause__


def of_envelope(read: "Callable[[Envelope], Found]", envelope: "Envelope", path: str) -> Found:
    """read(an envelope of a file). ReceiptError, which names the file, where read raises one."""
    try:
        return read(envelope)
    except ReceiptError as error:
        raise ReceiptError(f"{path}: {error}") from None


def verify_all(files: Files, model: str | None, **options: Any) -> int:
    """Verifies all receipts that a command line names; returns the exit status. ValueError for files that do not fit
    together. options: of the model."""
    from lockstep.receipts.around.files import Answered, found_in
    from lockstep.receipts.envelope import BATCH
    from lockstep.receipts.keys import load_public_key

    public = None if files.key is None else load_public_key(files.key)
    found, codes = of_file(found_in, files.path), []
    batches = [each for each in found if isinstance(each, Answered) and each.envelope.type == BATCH]
    if batches and len(found) > 1:
        raise ValueError(f"{files.path}: expected a batch alone in its file, got {len(found)} envelopes")
    if files.receipts is not None and not batches:
        raise ValueError(f"{files.path} is no batch, which --receipts belongs to: expected lockstep verify BATCH")
    if batches:
        codes, found = check_batch(batches[0].envelope, files, public)
        public = None  # the batch's signature stands for those of its receipts
    items, unread = items_of(found, files)
    codes += [say(UNCHECKED, f"{each.place}: not checked: {each.reason}") for each in unread]
    own = content_of(model) if items else ""
    for item in list(items):
        reason = difference_at_once(item.statement, own)
        if reason is not None:
            items.remove(item)
            codes.append(say(UNCHECKED, f"{placed(item)}not checked: {reason}"))
    if items:
        with loaded(model, [item.statement for item in items], **options) as llm:
            codes += [check_one(llm, item, public) for item in items]
    if len(found) > 1:
        say_summary(codes[-len(found) :])
    return FALSE if FALSE in codes else max(codes)


def content_of(model: str | None) -> str:
    """The content hash of a model, which is not loaded for it."""
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.weights.hub import resolve_model

    with Progress() as progress:
        return open_checkpoint(resolve_model(model, progress)).content.wait(progress)


def difference_at_once(statement: "Statement", content: str) -> str | None:
    """Why a statement cannot be checked here, where that is known before a model is loaded, and perhaps packed, in the
    formats that it names; None otherwise. content: of the model here."""
    from lockstep.receipts.identity import difference

    found = difference(statement.numerics, statement.model, replace(statement.model, content=content))
    return found and found[3]


def check_batch(
    batch: "Envelope", files: Files, public: "PublicKey | None"
) -> "tuple[list[int], Sequence[Answered | Unreadable]]":
    """Prints whether a batch is the one of its receipts, and signed; returns the exit status, and the receipts."""
    from lockstep.receipts.around.files import answered
    from lockstep.receipts.batch import batch_of, read_batch

    claimed = of_envelope(read_batch, batch, files.path)
    if files.receipts is None:
        raise ValueError(f"this is a batch of {claimed.num_answers} receipts: expected --receipts FILE, too")
    receipts = of_file(answered, files.receipts)
    if public is not None and not batch.is_signed_by(public):
        return [say(FALSE, f"false: the batch is not signed by key {public.id}")], receipts
    found = batch_of([each.envelope for each in receipts])
    if found.num_answers != claimed.num_answers:
        reason = f"the batch is of {claimed.num_answers} receipts, the file has {found.num_answers}"
        return [say(FALSE, f"false: {reason}")], receipts
    if found.root != claimed.root:
        return [say(FALSE, "false: the receipts, or their order, are not those of the batch")], receipts
    words = f"true: the batch of {claimed.num_answers} receipts"
    return [say(TRUE, "; ".join([words, *signed_words(batch, public)]))], receipts


def items_of(found: "Sequence[Answered | Unreadable]", files: Files) -> "tuple[list[Item], list[Unreadable]]":
    """The receipts, each with what the command line gives for it, and the lines that have none. ValueError where it
    gives too few or too many."""
    from lockstep.receipts.around.files import Unreadable
    from lockstep.receipts.errors import ReceiptError
    from lockstep.receipts.statement import from_bytes

    givens, bodies = givens_of(files, len(found)), bodies_of(files, len(found))
    items: list[Item] = []
    unread: list[Unreadable] = []
    for each, given, body in zip(found, givens, bodies, strict=True):
        if isinstance(each, Unreadable):
            unread.append(each)
            continue
        try:
            items.append(Item(each, from_bytes(each.envelope.payload), with_salt(given, each), body))
        except ReceiptError as error:
            if len(found) == 1:
                raise ReceiptError(f"{files.path}: {error}") from None
            unread.append(Unreadable(each.place, str(error)))
    return items, unread


def givens_of(files: Files, num_receipts: int) -> "list[Given]":
    """What the command line gives beside each receipt."""
    from lockstep.receipts.around.files import token_ids_in
    from lockstep.receipts.statement import salt_of
    from lockstep.receipts.verify import Given

    salts: list[bytes | None] = [salt_of(salt) for salt in files.salts] or [None] * num_receipts
    if len(salts) != num_receipts:
        raise ValueError(f"--salt: expected one for each of {counted(num_receipts, 'receipt')}, got {len(salts)}")
    if files.answer is not None and num_receipts > 1:
        raise ValueError(f"--answer: expected a file with one receipt, got one with {num_receipts}")
    output_ids = None if files.answer is None else of_file(token_ids_in, files.answer)
    return [Given(output_ids=output_ids, salt=salt) for salt in salts]


def bodies_of(files: Files, num_receipts: int) -> list[bytes | None]:
    """The body of the request of each receipt: of a file with a line for each, or all of the same."""
    from lockstep.receipts.around.files import lines_of

    if files.request is None:
        return [None] * num_receipts
    lines: list[bytes | None] = [line.encode() for line in lines_of(read_text(files.request))]
    if len(lines) not in (1, num_receipts):
        expected = f"expected one request, or a line for each of {counted(num_receipts, 'receipt')}"
        raise ValueError(f"--request: {expected}, got {len(lines)} lines")
    return lines if len(lines) == num_receipts else lines * num_receipts


def with_salt(given: "Given", found: "Answered") -> "Given":
    """What is given beside a receipt, with the salt beside it in its answer where none is given."""
    return given._replace(salt=found.salt) if given.salt is None else given


def loaded(name: str | None, statements: "Sequence[Statement]", **options: Any) -> "LLM":
    """The model, in the formats of the receipts. No name inside of a receipt is used to find it. ValueError for
    receipts of several formats."""
    [*formats] = {(s.model.weights, s.model.kv_dtype, s.model.rope or "auto") for s in statements}
    if len(formats) > 1:
        raise ValueError("the receipts are of models in several formats: expected files with those of one each")
    most = max(s.prompt.tokens + s.answer.tokens for s in statements)
    options |= dict(zip(("weights", "kv_dtype", "rope"), formats[0], strict=True))
    options |= dict(needed_context=max(4096, -(-most // 64) * 64))
    return load(name, prefix_cache=False, wait_for_content=True, **options)


def check_one(llm: "LLM", item: Item, public: "PublicKey | None") -> int:
    """Prints what verifying a receipt finds; returns the exit status."""
    envelope, member = item.found.envelope, item.found.member
    place = placed(item)
    signed = envelope if member is None else member.batch
    if public is not None and not signed.is_signed_by(public):
        what = "receipt" if member is None else "batch"
        return say(FALSE, f"{place}false: the {what} is not signed by key {public.id}")
    if member is not None and not member.is_true:
        return say(FALSE, f"{place}false: the receipt is not the one at its place in the batch")
    verdict, notes = verdict_of(llm, item)
    if verdict.is_true:
        within = [] if member is None else [f"number {member.place.index + 1} of a batch"]
        notes = [told_true(item.statement), *within, *notes, *signed_words(signed, public)]
        words = f"{'; '.join(notes)}; receipt {envelope.digest[:16]}"
    else:
        words = verdict.reason + (OPTIONS.get(verdict.what, "") if verdict.reason.endswith("needed, too") else "")
    return say(verdict.code, f"{place}{WORDS[verdict.code]}: {words}")


def placed(item: Item) -> str:
    """The place of a receipt in its file, before what is said of it."""
    return f"{item.found.place}: " if item.found.place else ""


def verdict_of(llm: "LLM", item: Item) -> tuple[Verdict, list[str]]:
    """The Verdict on a receipt, compared with its request and with the answer around it, where these are given; and
    what is to be said with it."""
    from lockstep.receipts.around.shown import Comparison
    from lockstep.receipts.verify import Given

    around, statement = item.found.shown, item.statement
    given = item.given if around is None else beside(item.given, around, statement)
    known: Given | Verdict = given
    if item.body is not None and llm.verifier.is_of_model(statement):
        from lockstep.serve.receipts.asked import with_request

        index, chat = around and around.index, llm.chat_model if llm.has_tokenizer else None
        known = with_request(llm, chat, item.body, statement, given, index)
    if not isinstance(known, Given):
        return known, []
    verdict = llm.verify(item.found.envelope, known)
    if around is None or not verdict.is_true:
        return verdict, []
    ids = list(statement.prompt.ids or known.prompt_ids or ())
    compared = Comparison(around, statement, verdict, ids, lambda text: is_text_of(llm, text, ids))
    return compared.verdict(), compared.notes


def beside(given: "Given", around: "Shown", statement: "Statement") -> "Given":
    """What a verifier has, with the token ids that the answer around a receipt shows."""
    ids = given.output_ids if given.output_ids is not None else around.output_ids(statement)
    return given._replace(output_ids=ids, prompt_ids=given.prompt_ids or around.prompt_ids)


def is_text_of(llm: "LLM", text: str, ids: list[int]) -> bool:
    """Whether a text is that of token ids: the one that they have, or one that has them."""
    if not llm.has_tokenizer:
        return False
    tokenizer = llm.tokenizer
    if text == tokenizer.decode(ids):
        return True
    return tokenizer.only_decodes is None and any(tokenizer.encode(text, special) == ids for special in (True, False))


def told_true(statement: "Statement") -> str:
    """What is true of a statement, in words."""
    params, answer, prompt = statement.params, statement.answer, statement.prompt
    choice = f"temperature {params.temperature:g}, seed {params.seed}" if params.temperature else "greedy"
    sample = f", sample {statement.sample} of {params.n}" if params.n > 1 else ""
    tokens, before = counted(answer.tokens, "token"), counted(prompt.tokens, "token")
    if prompt.root is None:
        tokens = f"{tokens} after a prompt of {prompt.tokens}"
    else:
        tokens = f"the log-probabilities of a prompt of {before}, and {tokens} after it"
    return f"{tokens}, {choice}{sample}, ended by {answer.finish_reason}"


def signed_words(envelope: "Envelope", public: "PublicKey | None") -> list[str]:
    """By whom an envelope is signed, in words; none for one that is not."""
    if public is not None:
        return [f"signed by key {public.id}"]
    if envelope.signatures:
        return [f"signed by key {envelope.signatures[0].key_id}, which was not checked (--key)"]
    return []


def say_summary(codes: Sequence[int]) -> None:
    """Prints how many receipts are true, false and not checked."""
    counts = Counter(codes)
    parts = [f"{counts[code]:,} {words}" for code, words in WORDS.items() if counts[code]]
    print(f"{len(codes):,} receipts: {', '.join(parts)}")


def say(code: int, line: str) -> int:
    """Prints a line, in which what a receipt says cannot make another; returns the code."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(shown(printable, sys.stdout), file=sys.stdout, flush=True)
    return code
