"""`lockstep ptq run`: tries many quantization plans of one model on one text."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.commands.options import Threads
from lockstep.progress import Progress

if TYPE_CHECKING:
    from lockstep.replicas.ray_carrier import RayCluster


def command(
    recipe: Annotated[pathlib.Path, typer.Argument(help="A recipe, in TOML.")],
    out: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FOLDER", help="The study's folder.", show_default="RECIPE-study, where you are"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the windows of a round.")] = 1,
    threads: Threads = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default="none, jobs are processes of this machine",
            help="Have Ray carry the jobs, --threads each: local (a cluster of its own here), auto or HOST:PORT.",
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the recipe, as evaluate.windows=8."),
    ] = None,
) -> None:
    """Calibrate once, try every plan of a recipe on the same windows, rank them. An interrupted study continues where
    it was; the results are the same bytes for any number of jobs and threads."""
    from lockstep.commands.ptq.eval import made_team
    from lockstep.study.assemble import assembled, keep_recipe, save_winner
    from lockstep.study.recipe import Recipe
    from lockstep.study.records import check_folder
    from lockstep.study.run import RunOptions, ranking, run_study

    folder = out or pathlib.Path(f"{recipe.stem}-study")
    check_folder(folder)
    read = Recipe.load(recipe, change or ())
    say = lambda line: print(f"lockstep: {line}", file=sys.stderr)
    with told_interrupt("lockstep ptq run"):
        with Progress() as progress:
            study, subject = assembled(read, progress)
            keep_recipe(folder, read)
        with made_team(threads) as team, cluster(ray) as elsewhere, Progress() as progress:
            options = RunOptions(jobs, team.num_threads, progress.step, say, elsewhere)
            trials = run_study(folder, study, subject, team, options)
    ranked = ranking(trials)
    if ranked:
        save_winner(folder, read, ranked[0]["plan"])
    show(folder)
    if not ranked:
        raise ValueError(f"{folder}: none of the {len(trials)} trials could run, for the reasons above")
    if read.top and not (folder / "confirm.jsonl").exists():
        print(f"lockstep ptq confirm {folder} runs the best {read.top} head by head, as hardware does", file=sys.stderr)


@contextlib.contextmanager
def cluster(ray: str | None) -> "Iterator[RayCluster | None]":
    """A context with a Ray cluster; None without an address."""
    if ray is None:
        yield None
        return
    from lockstep.replicas.ray_carrier import RayCluster

    with contextlib.closing(RayCluster(ray)) as made:
        yield made


@contextlib.contextmanager
def told_interrupt(name):
    """A context in which Ctrl-C prints how the interrupted work continues, before it ends the command."""
    try:
        yield
    except KeyboardInterrupt:
        after = "goes on where it was" if name == "lockstep ptq run" else "starts anew"
        print(f"lockstep: interrupted; the same `{name}` {after}", file=sys.stderr)
        raise


def show(folder) -> None:
    """Writes the report; prints its table and its path."""
    from lockstep.commands.terminal.output import write
    from lockstep.study.report.report import text_table, write_report

    path = write_report(folder)
    write(text_table(folder) + f"\n{path}\n")
