"""The command `lockstep`: finds the subcommand, runs it, and turns a user's mistake, or a lack of memory, into one
sentence and exit code 2.

A subcommand is a module in `lockstep/commands` with a function `command`; "bench load" is `bench_load.py`, "ptq run" is
`ptq/run.py`. Only the subcommand that runs is imported, so that `lockstep --help` stays fast.
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
from lockstep.commands.terminal.mistyped import complaint
from lockstep.commands.terminal.output import shown, unread

COMMANDS = {
    "generate": "Continue a text with a model.",
    "chat": "Talk with a model.",
    "serve": "Answer requests over HTTP, as OpenAI's API does.",
    "batch": "Answer all requests of a file; what was interrupted goes on.",
    "parity": "Show that every path of a model gives the same bits.",
    "bench": "Measure prefill and decode, A/B, and this machine's ceiling.",
    "bench load": "Drive arrivals against the engine, without HTTP; latencies and throughput.",
    "bench scaling": "Predict the speed on more cores, op by op, and what limits it.",
    "bench speculate": "Measure what drafts gain, by how many are right.",
    "ptq sites": "List what of a model a quantization plan can round.",
    "ptq eval": "Score a text: perplexity, and what a quantization plan changes.",
    "ptq run": "Try many quantization plans on one text, and rank them.",
    "ptq confirm": "Run the best plans of a study head by head, as hardware does, and compare the bits.",
    "ptq show": "Show what a study has found.",
    "verify": "Verify the receipt of an answer with the model that made it.",
    "receipt key": "Make a key that signs receipts.",
    "receipt show": "Show what a receipt or a batch says.",
    "receipt batch": "Sign the receipts of a whole run at once.",
    "receipt extract": "Take one receipt of a batch, with what shows that it is signed.",
    "list": "List the models on this disk, and which of them can be run.",
    "inspect": "Show a model's config, tensors, program and memory.",
    "cache": "List what is kept on disk: packed weights, compiled kernels.",
    "cache prune": "Remove what is kept on disk.",
}
# Groups of commands that have a folder, and what their help says first.
GROUPS = {
    "ptq": "Find out how few bits a model's weights, activations and KV cache can have: score one quantization plan, "
    "or try many and rank them.",
    "receipt": "Make the keys that sign receipts of answers; show, sign and take out receipts. lockstep verify "
    "verifies them.",
}
RENAMED = {"bench serve": "bench load"}
# The base of all complaints about the command line; typer has no name for it.
UsageError: Any = typer.BadParameter.__mro__[2]
CANNOT, INTERRUPTED = 2, 130


def main(args=None):
    """Runs a command line; returns the exit code. args: None: the arguments of this process."""
    if args is None:
        heed_interrupts()
    args = _helped(sys.argv[1:] if args is None else list(args))
    group, args = _group(args), _joined(args) or ["--help"]
    if (old := " ".join(args[:2])) in RENAMED and not os.path.exists(args[1]):
        return _refuse(f"{old}: this command is called lockstep {RENAMED[old]} now")
    if sys.stderr is None:  # it was closed before the start: nobody reads it
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:  # a file that is opened next would be standard output
        sys.stdout = open(os.devnull, "w")
        if args[0] != "serve":
            return _refuse("standard output is closed: expected something to print to, such as > /dev/null")
    if like := _misspelt(args):
        return _refuse(f"{' '.join(args[:2])}: no such command or model; did you mean {' or '.join(like)}?")
    # a character that the terminal cannot show becomes "?" instead of an exception
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return application(args, group)(args, prog_name=f"lockstep {group}".rstrip(), standalone_mode=False) or 0
    except UsageError as error:
        return _refuse(complaint(error, args))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("LOCKSTEP_TRACEBACK") or not is_told(error):
            raise
        return _refuse(sentence(error))
    except SystemExit:
        # typer and rich exit so when the reader of standard output has gone; their code 1 means something else here
        return unread()


def heed_interrupts() -> None:
    """Lets Ctrl-C end this process even if it was started with SIGINT ignored, which Python keeps. A shell script
    starts its background processes so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _helped(args):
    """The arguments, with "help COMMAND" as "COMMAND --help"."""
    return [*args[1:], "--help"] if args and args[0] == "help" else args


def _misspelt(args) -> list[str]:
    """The commands of two words that two words are like, where they are no command and no model."""
    is_first = bool(args[1:]) and any(name.startswith(f"{args[0]} ") for name in COMMANDS)
    if not is_first or not args[1].isalpha() or os.path.exists(args[1]):
        return []
    import difflib

    seconds = {name.partition(" ")[2]: name for name in COMMANDS if name.startswith(f"{args[0]} ")}
    return [f"lockstep {seconds[word]}" for word in difflib.get_close_matches(args[1], seconds)]


def _group(args) -> str:
    """The first word of the commands that arguments such as "receipt" or "receipt --help" ask about, with a space
    behind it; "" for other arguments."""
    is_alone = bool(args) and args[0] not in COMMANDS and args[1:] in ([], ["-h"], ["--help"])
    return f"{args[0]} " if is_alone and any(name.startswith(f"{args[0]} ") for name in COMMANDS) else ""


def _joined(args):
    """The arguments, with a command of two words joined to one argument; the first word of some becomes "--help"."""
    if _group(args):
        return ["--help"]
    return [" ".join(args[:2]), *args[2:]] if " ".join(args[:2]) in COMMANDS else args


def application(args, group: str = ""):
    """The command line's parser. The subcommand in args has its options; the others have only a name and a summary.
    group: what the commands begin with that there are, which the help leaves out; "": all."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        help=GROUPS.get(group.strip(), _top.__doc__),
        context_settings=dict(help_option_names=["-h", "--help"]),
    )
    app.callback()(_of_group if group else _top)
    subcommand = next((word for word in args if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        module = f"lockstep.commands.{name.replace(' ', '.' if name.split()[0] in GROUPS else '_')}"
        if name.startswith(group) and importlib.util.find_spec(module):
            function = importlib.import_module(module).command if name == subcommand else _not_loaded
            app.command(name.removeprefix(group), short_help=summary, help=function.__doc__ or summary)(function)
    return app


def _top(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=lambda is_set: _show_version(is_set), help="Show the version."
    ),
) -> None:
    """An LLM inference engine whose every path gives the same bits."""


def _of_group() -> None:  # a group has no options of its own
    pass


def _not_loaded() -> None:  # stands for each subcommand that does not run
    pass


def _show_version(is_set) -> None:
    if is_set:
        print(f"lockstep {__version__}")
        raise typer.Exit


def _refuse(reason):
    print(shown(f"lockstep: {reason}", sys.stderr), file=sys.stderr)
    return CANNOT
