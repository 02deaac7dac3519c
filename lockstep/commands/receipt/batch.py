"""`lockstep receipt batch`: one signature for the receipts of a whole run."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.commands.options import ReceiptKey
from lockstep.commands.terminal.receipts import check_other


def command(
    receipts: Annotated[str, typer.Argument(metavar="RECEIPTS", help="A file with a receipt on each line.")],
    path: Annotated[str, typer.Argument(metavar="FILE", help="The file for the batch.")],
    receipt_key: ReceiptKey = None,
) -> None:
    """Bind many receipts, such as those of an evaluation (lockstep serve --receipts FILE), by the root of one tree,
    which one signature signs. lockstep verify FILE --receipts RECEIPTS checks them all, lockstep receipt extract takes
    one of them out."""
    from lockstep.commands.terminal.verification import of_file
    from lockstep.receipts.around.files import answered
    from lockstep.receipts.batch import batch_of
    from lockstep.receipts.envelope import BATCH, Envelope
    from lockstep.receipts.keys import load_signing_key

    check_other(path, receipts)
    key = None if receipt_key is None else load_signing_key(receipt_key)
    batch = batch_of([each.envelope for each in of_file(answered, receipts)])
    made = Envelope(batch.to_bytes(), BATCH)
    Path(path).write_bytes((made if key is None else made.signed(key)).to_bytes() + b"\n")
    print(f"batch {made.digest[:16]} of {batch.num_answers} receipts in {path}")
