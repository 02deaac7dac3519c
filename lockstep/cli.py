"""The command `lockstep`: finds the subcommand, runs it, and turns a user's mistake, or a lack of memory, into one
sentence and exit code 2.

A subcommand is a module in `lockstep/commands` with a function `command`; the commands of two words have
modules of their own. Only the one that is asked for is imported, so that `lockstep --help` stays fast.
"""

import importlib
import importlib.util
import io
import os
import signal
import sys
from typing import Any

import typer

from lockstep import __version__
from lockstep.commands.terminal.errors import is_told, sentence
from lockstep.commands.terminal.output import shown, unread

COMMANDS = {
    "generate": "Continue a text with a model.",
    "chat": "Talk with a model.",
    "serve": "Answer requests over HTTP, as OpenAI's API does.",
    "parity": "Show that every path of a model gives the same bits.",
    "bench": "Measure prefill and decode, A/B, and this machine's ceiling.",
    "bench load": "Drive arrivals against the engine, without HTTP; latencies and throughput.",
    "bench speculate": "Measure what drafts gain, by how many are right.",
    "ptq sites": "List what of a model a quantization plan can round.",
    "ptq eval": "Score a text: perplexity, and what a quantization plan changes.",
    "ptq run": "Try many quantization plans on one text, and rank them.",
    "ptq confirm": "Run the best plans of a study head by head, as hardware does, and compare the bits.",
    "ptq show": "Show what a study has found.",
    "inspect": "Show a model's config, tensors, program and memory.",
    "cache": "List what is kept on disk: packed weights, compiled kernels.",
    "cache prune": "Remove what is kept on disk.",
}
# The base of all complaints about the command line; typer has no name for it.
UsageError: Any = typer.BadParameter.__mro__[2]
CANNOT, INTERRUPTED = 2, 130


def main(args=None):
    """Runs a command line; returns the exit code. args: those of the process, if there are none."""
    if args is None:
        heed_interrupts()
    args = _joined(sys.argv[1:] if args is None else list(args)) or ["--help"]
    # a terminal that cannot show a character shows another
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return application(args)(args, prog_name="lockstep", standalone_mode=False) or 0
    except UsageError as error:
        return _refuse(f"{error.format_message()} (lockstep --help lists commands and options)")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("LOCKSTEP_TRACEBACK") or not is_told(error):
            raise
        return _refuse(sentence(error))
    except SystemExit:
        # how typer and rich end when nobody reads standard output; they would say 1, which has another meaning here
        return unread()


def heed_interrupts() -> None:
    """Lets Ctrl-C end this process, also where it was started with SIGINT ignored, as scripts start what they put into
    the background: Python itself then ignores it, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _joined(args):
    """The arguments, with a command of two words as one of them; the first word alone asks for the list of commands."""
    if args and args[0] not in COMMANDS and args[1:] in ([], ["--help"]):
        return ["--help"] if any(name.startswith(f"{args[0]} ") for name in COMMANDS) else args
    return [" ".join(args[:2]), *args[2:]] if " ".join(args[:2]) in COMMANDS else args


def application(args):
    """The command line's parser: the subcommand that args ask for in full, the others by name only."""
    made = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help=_top.__doc__)
    made.callback()(_top)
    wanted = next((a for a in args if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        module = f"lockstep.commands.{name.replace(' ', '_')}"
        if importlib.util.find_spec(module):
            function = importlib.import_module(module).command if name == wanted else _not_asked_for
            made.command(name, short_help=summary, help=function.__doc__ or summary)(function)
    return made


def _top(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=lambda asked: _show_version(asked), help="Show the version."
    ),
) -> None:
    """An LLM inference engine whose every path gives the same bits."""


def _not_asked_for() -> None:
    pass


def _show_version(asked) -> None:
    if asked:
        print(f"lockstep {__version__}")
        raise typer.Exit


def _refuse(reason):
    print(shown(f"lockstep: {reason}", sys.stderr), file=sys.stderr)
    return CANNOT
