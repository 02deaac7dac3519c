"""`lockstep ptq sites`: lists the sites of a model, which a quantization plan can round."""

import fnmatch
import json
from dataclasses import asdict
from typing import Annotated

import typer

from lockstep.commands.options import ModelName
from lockstep.commands.terminal.tables import made_table, report_console


def command(
    model: ModelName = None,
    match: Annotated[str, typer.Option(metavar="GLOB", help="Only sites whose names match, as in rules.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the sites of a model: tensors, or parts of them, that a plan can round. No weights are read."""
    from lockstep.engine.model import load_model
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.ptq.rewrite import sites_of
    from lockstep.weights.hub import resolve_model
    from lockstep.weights.store import WeightStore

    loaded = load_model(open_checkpoint(resolve_model(model)), WeightStore(), "f32", "f32")
    every = sites_of(loaded.recorded)
    sites = [site for site in every if fnmatch.fnmatchcase(site.name, match)]
    if not sites:
        raise ValueError(f"--match {match!r}: it matches none of the model's {len(every)} sites")
    if as_json:
        print(json.dumps([asdict(site) for site in sites]))
    else:
        show(sites)


def show(sites) -> None:
    """Prints the table."""
    table = made_table(f"{len(sites)} sites", "site", "is", ">heads", ">numbers of a row")
    for site in sites:
        what = "weight" if site.is_weight else "inside an op" if site.is_inner else "tensor"
        table.add_row(site.name, what, str(site.heads), str(site.width or "keys"))
    report_console().print(table)
