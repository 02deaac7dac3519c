"""`lockstep chat`: a conversation in the terminal."""
import sys
from typing import Annotated

import typer

from lockstep.commands.options import CacheDir, KvDtype, ModelName, OpSwaps, Threads, Weights, load


def command(
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Keep only the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens that reach this sum.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop tokens less probable than this part of the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Another seed, another sample.")] = 0,
    num_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Most tokens of an answer.")] = 1024,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    max_context: Annotated[int, typer.Option(min=1, help="Tokens that a conversation may have.")] = 8192,
    cache_dir: CacheDir = None,
    op: OpSwaps = None,
):
    """Talk with a model. /help lists what can be typed; Ctrl-C interrupts an answer, Ctrl-D ends."""
    from lockstep.commands.conversation import Conversation

    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=num_tokens)
    llm = load(model, weights=weights, kv_dtype=kv_dtype, threads=threads, max_context=max_context, ops=op,
               cache_dir=cache_dir, needs_chat=True)
    talk = Conversation(llm, settings, system)
    _greet(sys.stdin.isatty())
    while talk.open:
        line = read_line(sys.stdin.isatty())
        if line is None:
            break
        talk.hear(line)
    llm.close()


def _greet(interactive):
    if not interactive:
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() has history and editing once it is imported
    print("/help for commands, Ctrl-C interrupts an answer, Ctrl-D ends", file=sys.stderr)


def read_line(interactive):
    """The next line that was typed, or None at the end. Ctrl-C at the prompt only drops the line."""
    while True:
        try:
            line = input("> ") if interactive else input()
            line.encode()  # what was not UTF-8 has become lone surrogates
            return line
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D or /exit ends)", file=sys.stderr)
        except UnicodeError:
            print("that was not UTF-8 text", file=sys.stderr)
