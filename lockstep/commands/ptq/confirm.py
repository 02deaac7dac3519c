"""`lockstep ptq confirm`: runs the best plans of a study head by head, as hardware would."""

import pathlib
from typing import Annotated

import typer

from lockstep.commands.options import Threads
from lockstep.progress import Progress


def command(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="FOLDER", help="A study's folder.")],
    top: Annotated[
        int | None, typer.Option(min=1, help="How many of the best plans.", show_default="as the recipe says")
    ] = None,
    threads: Threads = None,
) -> None:
    """Run the best plans of a study on the twin prefill, attention head by head, and compare every token's scores with
    those that ranked them, bit for bit. Exit 1 if one differs."""
    from lockstep.commands.ptq.eval import made_team
    from lockstep.commands.ptq.run import show, told_interrupt
    from lockstep.commands.terminal.output import write
    from lockstep.study.assemble import assembled, kept_recipe
    from lockstep.study.confirm import confirm_study
    from lockstep.study.report.folder import read_folder

    recipe = kept_recipe(folder)
    top = recipe.top if top is None else top
    if not top:
        raise ValueError(f"{folder}: its recipe says confirm.top = 0, so nothing is to be confirmed; expected --top N")
    read_folder(folder)
    with told_interrupt("lockstep ptq confirm"):
        with Progress() as progress:
            study, subject = assembled(recipe, progress)
        with made_team(threads) as team, Progress() as progress:
            records = confirm_study(folder, study, subject, team, top, progress.step)
    show(folder)
    for record in records:
        write(f"{words(record)}\n")
        if "integer" in record:
            write(f"    {integer_words(record)}\n")
        if "float" in record:
            metrics = record["float"]["metrics"]
            write(f"    in floats: {metrics['nll']:.6f} nats a token, delta {metrics['delta_nll']:+.6f}\n")
    if not all(record["parity"]["equal"] for record in records):
        raise typer.Exit(1)


def integer_words(record) -> str:
    """A line about the confirmed plan in integer arithmetic."""
    integer, floats = record["integer"], record["integer"]["floats"]
    pairs = record["disagreement"].values()
    different, total = (sum(pair[i] for pair in pairs) for i in range(2))
    line = f"in integers: {integer['metrics']['nll']:.6f} nats a token, delta {integer['metrics']['delta_nll']:+.6f}, "
    line += f"{integer['layers']} linear layers"
    if total:
        line += f", {different / total:.4%} of their rounded outputs are another code"
    if floats:
        site, reason = next(iter(floats.items()))
        line += f"; {len(floats)} stay in floats, as {site}: {reason}"
    return line


def words(record) -> str:
    """A line about a confirmed trial."""
    metrics = record["metrics"]
    line = f"{record['name']}: prefill {metrics['nll']:.6f} nats a token, delta {metrics['delta_nll']:+.6f}, "
    line += f"rank {record['confirmed_rank']} (fast {record['fast_rank']}), "
    if record["parity"]["equal"]:
        return line + f"the same bits in all {record['tokens']} tokens"
    return line + "OTHER BITS: " + ", ".join(f"{name} {value}" for name, value in record["parity"]["first"].items())
