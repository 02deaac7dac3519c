"""`lockstep receipt extract`: one receipt of a batch, with its path to the root that is signed."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.commands.terminal.receipts import check_other


def command(
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="The file with the batch.")],
    receipts: Annotated[str, typer.Argument(metavar="RECEIPTS", help="The file with its receipts.")],
    line: Annotated[int, typer.Argument(metavar="LINE", min=1, help="Which of them, counted from 1.")],
    path: Annotated[str, typer.Argument(metavar="FILE", help="The file for the receipt.")],
) -> None:
    """Take one receipt of a batch out of its run: FILE has it, the batch with its signature, and the path that leads
    from one to the other. lockstep verify FILE --key KEY.pub checks all three, without the other receipts."""
    from lockstep.commands.terminal.verification import of_file
    from lockstep.receipts import strict_json
    from lockstep.receipts.around.files import answered
    from lockstep.receipts.batch import member_of

    check_other(path, batch, receipts)
    found = of_file(answered, batch)
    if len(found) != 1:
        raise ValueError(f"{batch}: expected a batch alone in its file, got {len(found)} envelopes")
    envelopes = [each.envelope for each in of_file(answered, receipts)]
    if line > len(envelopes):
        raise ValueError(f"LINE: expected 1 to {len(envelopes)}, got {line}")
    made = member_of(envelopes, found[0].envelope, line - 1)
    Path(path).write_bytes(strict_json.dumps(made.to_object()) + b"\n")
    print(f"receipt {made.receipt.digest[:16]}, number {line} of {len(envelopes)}, in {path}")
