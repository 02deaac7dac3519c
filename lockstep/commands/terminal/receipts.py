"""Receipts on the command line: the file in which one is written, and what a verification says."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.commands.options import say_unused

if TYPE_CHECKING:
    from lockstep.engine.request import Request, SamplingParams
    from lockstep.llm import LLM
    from lockstep.receipts.receipt import ReceiptOptions

PARTS = ("receipt_key", "receipt_tags", "receipt_detached", "receipt_hide_prompt", "nonce")


@dataclass(frozen=True)
class ReceiptFile:
    """The file for the receipt of an answer, and what the receipt is to have."""

    path: Path
    options: "ReceiptOptions"

    def drawn_seed(self, llm: "LLM", prompt: str) -> dict[str, int]:
        """The seed that follows from the nonce, as over HTTP, for a request without one; none without a nonce."""
        from lockstep.receipts.parameters import seed_of

        nonce = self.options.nonce
        return {} if nonce is None else dict(seed=seed_of(nonce, llm.encode(prompt)))

    def write(self, llm: "LLM", request: "Request", params: "SamplingParams") -> dict[str, Any]:
        """Makes the receipt of a request that has ended, writes it, and says so on standard error. Returns the fields
        of an answer in JSON that have it."""
        make = llm.new_receipt(params, self.options)
        assert make is not None, "its options ask for one"
        receipt = make(request, 0)
        receipt.save(self.path)
        print(f"lockstep: receipt {receipt.envelope.digest[:16]} in {self.path}", file=sys.stderr)
        if receipt.salt is not None:
            print(f"lockstep: the prompt's salt, for whoever may verify it: {receipt.salt.hex()}", file=sys.stderr)
        return dict(prompt_token_ids=request.prompt_ids, **receipt.to_fields())


def receipt_file(invoked: Any, path: str | None, key: str | None, parts: dict[str, Any]) -> ReceiptFile | None:
    """The ReceiptFile that options ask for, if they do. ValueError before long work for a file that cannot be written,
    and for a key that cannot be read. parts: arguments of ReceiptOptions."""
    if path is None:
        say_unused(invoked, PARTS, "without --receipt")
        return None
    if path == "-":
        raise ValueError("--receipt -: expected a file; on standard output is the answer, with --json and its receipt")
    from lockstep.receipts.keys import load_signing_key
    from lockstep.receipts.receipt import ReceiptOptions

    made = ReceiptOptions(**parts, key=None if key is None else load_signing_key(key))
    with open(path, "ab"):  # OSError now, and nothing is lost that was there
        pass
    return ReceiptFile(Path(path), made)


def check_other(path: str, *read: str) -> None:
    """ValueError for a file to be written that is one of those that are read."""
    if os.path.exists(path) and any(os.path.exists(each) and os.path.samefile(path, each) for each in read):
        raise ValueError(f"{path}: expected another file to write to than one that is read")
