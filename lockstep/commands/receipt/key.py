"""`lockstep receipt key`: makes a key that signs receipts."""

from typing import Annotated

import typer


def command(path: Annotated[str, typer.Argument(metavar="FILE", help="A new file for the key.")]) -> None:
    """Make an Ed25519 key that signs receipts: FILE for its owner, and FILE.pub for everybody who verifies them."""
    from lockstep.receipts.keys import create_key

    print(f"key {create_key(path).public.id}: {path} signs, {path}.pub verifies")
