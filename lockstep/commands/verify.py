"""`lockstep verify`: whether the answer of a receipt is the model's, bit for bit."""

from typing import Annotated

import typer

from lockstep.commands.options import ModelName, PlanFile, Threads
from lockstep.commands.terminal.verification import Files, verify_all


def command(
    receipt: Annotated[
        str,
        typer.Argument(
            metavar="RECEIPT", help="A file with a receipt, many, a batch, an API's answer or a stream of it; or -."
        ),
    ],
    named: ModelName = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default=False, help="The same as MODEL: the model that made the answer."),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The JSON that was sent: the receipt has to be of this request. Or a line for each receipt.",
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
        list[str] | None,
        typer.Option(
            metavar="HEX",
            show_default="the receipt_salt beside it",
            help="The salt of a prompt that the receipt hides. Repeatable: one for each receipt.",
        ),
    ] = None,
    plan: PlanFile = None,
    threads: Threads = None,
) -> None:
    """Verify that the model gives the answer of a receipt: the same tokens, log-probabilities and hidden states, bit
    for bit, and the same end. One prefill of prompt and answer does it, in a fraction of the time of the answer.

    The exit status is 0 if it is true, 1 if it is false (what is wrong is said), 2 if it cannot be checked here.
    """
    if None not in (model, named):
        raise ValueError(f"expected the model once, got {named} and --model {model}")
    files = Files(receipt, request, answer, receipts, key, tuple(salt or ()))
    raise typer.Exit(verify_all(files, model or named, plan=plan, threads=threads))
