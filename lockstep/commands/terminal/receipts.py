"""Receipts on the command line: the file in which one is written, and what a verification says."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.commands.options import say_unused
from lockstep.commands.terminal.output import counted

if TYPE_CHECKING:
    from lockstep.engine.request import Request, SamplingParams
    from lockstep.llm import LLM
    from lockstep.receipts.receipt import ReceiptOptions
    from lockstep.receipts.statement import Statement
    from lockstep.receipts.verdict import Verdict

PARTS = ("receipt_key", "receipt_tags", "receipt_detached", "receipt_hides_prompt", "nonce")


@dataclass(frozen=True)
class ReceiptFile:
    """The file for the receipt of an answer, and what the receipt is to have."""

    path: Path
    options: "ReceiptOptions"

    def write(self, llm: "LLM", request: "Request", params: "SamplingParams") -> None:
        """Makes the receipt of a request that has ended, writes it, and says so on standard error."""
        make = llm.new_receipt(params, self.options)
        assert make is not None, "its options ask for one"
        receipt = make(request, 0)
        receipt.save(self.path)
        print(f"lockstep: receipt {receipt.envelope.digest[:16]} in {self.path}", file=sys.stderr)
        if receipt.salt is not None:
            print(f"lockstep: the prompt's salt, for whoever may verify it: {receipt.salt.hex()}", file=sys.stderr)


def receipt_file(invoked: Any, path: str | None, key: str | None, parts: dict[str, Any]) -> ReceiptFile | None:
    """The ReceiptFile that options ask for, if they do. ValueError before long work for a file that cannot be written,
    and for a key that cannot be read. parts: arguments of ReceiptOptions."""
    if path is None:
        say_unused(invoked, PARTS, "without --receipt")
        return None
    from lockstep.receipts.keys import load_signing_key
    from lockstep.receipts.receipt import ReceiptOptions

    made = ReceiptOptions(**parts, key=None if key is None else load_signing_key(key))
    with open(path, "ab"):  # OSError now, and nothing is lost that was there
        pass
    return ReceiptFile(Path(path), made)


def told(verdict: "Verdict", statement: "Statement") -> str:
    """A verification's outcome in one line."""
    if not verdict.is_true:
        return f"{'false' if verdict.code == 1 else 'not checked'}: {verdict.reason}"
    params, answer = statement.params, statement.answer
    choice = f"temperature {params.temperature:g}, seed {params.seed}" if params.temperature else "greedy"
    sample = f", sample {statement.sample} of {params.n}" if params.n > 1 else ""
    tokens = f"{counted(answer.tokens, 'token')} after a prompt of {statement.prompt.tokens}"
    return f"true: {tokens}, {choice}{sample}, ended by {answer.finish_reason}"
