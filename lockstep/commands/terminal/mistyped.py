"""What is said of a command line that cannot be read: of an option that there is not, what it may mean."""

from collections.abc import Sequence
from typing import Any

from lockstep.other_names import HERE, OF_GPUS, ONLY_CPUS, called_here, near

HELP = "lockstep --help lists commands and options"


def complaint(error: Any, args: Sequence[str]) -> str:
    """The sentence about a complaint of typer's. args: the arguments that it read."""
    wrong = _glued(args) or getattr(error, "option_name", None)
    if wrong is None or error.ctx is None or wrong in _options(error.ctx):
        return f"{error.format_message()} ({HELP})"
    return f"No such option: {wrong}{_hint(_plain(wrong), error.ctx)} ({HELP})"


def _glued(args: Sequence[str]) -> str | None:
    """The first argument such as -ngl, which other programs have, and which typer reads as -n with the value "gl"."""
    words = [word.partition("=")[0] for word in args if word[:1] == "-" and word[1:2] != "-"]
    return next((word for word in words if len(word) > 2 and word[1:] in OF_GPUS | HERE.keys()), None)


def _hint(name: str, context: Any) -> str:
    """What may be meant by an option, beginning with "; " or ": "; "" where nothing is near."""
    if name in OF_GPUS:
        return f": {ONLY_CPUS}"
    params = {_plain(written): param for param in context.command.params for written in param.opts}
    here = name if name in params else called_here(name, params)
    if here is not None:
        return f"; {_called(params[here], context)}"
    long = [option for option in _options(context) if option.startswith("--")]
    like = near(HERE.get(name, name), [_plain(option) for option in long])
    return f"; did you mean {' or '.join(option for option in long if _plain(option) in like)}?" if like else ""


def _called(param: Any, context: Any) -> str:
    """How a parameter of a command is written, as a clause."""
    if param.param_type_name == "option":
        return f"it is called {' or '.join(param.opts)} here"
    return f"it is an argument without a name here: {context.command_path} {param.name.upper()}"


def _options(context: Any) -> list[str]:
    """All options of a command, as they are written."""
    params = context.command.get_params(context)
    options = [param for param in params if param.param_type_name == "option"]
    return [name for param in options for name in (*param.opts, *param.secondary_opts)]


def _plain(option: str) -> str:
    """An option as Python writes it: --max-tokens as max_tokens."""
    return option.lstrip("-").replace("-", "_")
