"""`lockstep receipt show`: what a receipt or a batch says, without verifying it."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.commands.terminal.output import write

if TYPE_CHECKING:
    from lockstep.receipts.envelope import Envelope


def command(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="A file with a receipt, many, a batch or an API's answer; or -.")
    ],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show token ids as numbers; else only how many there are.")
    ] = False,
) -> None:
    """Show what receipts say, as JSON: the digest by which other commands call it, who is said to have signed it, and
    its payload. Nothing is verified."""
    from lockstep.commands.terminal.verification import of_file
    from lockstep.receipts.around.files import answered

    for each in of_file(lambda text: [described(one.envelope, tokens) for one in answered(text)], path):
        write(json.dumps(each, indent=2) + "\n")


def described(envelope: "Envelope", with_tokens: bool) -> dict[str, Any]:
    """What an envelope says, with packed token ids as numbers, or none of them."""
    from lockstep.receipts import strict_json
    from lockstep.receipts.envelope import RECEIPT
    from lockstep.receipts.statement import from_bytes

    payload = strict_json.of_payload(envelope.payload)
    if envelope.type == RECEIPT:
        statement = from_bytes(envelope.payload)
        for name, part in dict(prompt=statement.prompt, answer=statement.answer).items():
            if part.ids is not None:
                payload[name]["ids"] = list(part.ids) if with_tokens else f"{len(part.ids)} ids (--tokens)"
    signatures = [each.key_id for each in envelope.signatures]
    return dict(digest=envelope.digest, type=envelope.type, keyids=signatures, payload=payload)
