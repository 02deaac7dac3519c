"""`lockstep chat`: a conversation in the terminal."""

import sys
from typing import Annotated, Any

import typer

from lockstep.commands.options import (
    CacheDir,
    Draft,
    GenerationConfig,
    KvDtype,
    ModelName,
    OpSwaps,
    PlanFile,
    Speculate,
    Threads,
    VerifyWeights,
    Weights,
    context_words,
    load,
)

MODELS = "the model's"  # shown as the default of sampling options


def command(
    *,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the most probable token.", show_default=f"{MODELS}, or 0.7")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep only the k most probable tokens; 0: all.", show_default=MODELS)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most probable tokens that reach this sum.", show_default=f"{MODELS}, or 0.95"),
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less probable than this part of the best.", show_default=MODELS)
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens of the conversation become less probable.", show_default=MODELS),
    ] = None,
    generation_config: GenerationConfig = "auto",
    seed: Annotated[int, typer.Option(help="Another seed, another sample.")] = 0,
    num_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Most tokens of an answer.")] = 1024,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that a conversation may have.", show_default="the model's, as far as memory holds it"
        ),
    ] = None,
    cache_dir: CacheDir = None,
    speculate: Speculate = "off",
    plan: PlanFile = None,
    draft: Draft = None,
    verify_weights: VerifyWeights = False,
    op: OpSwaps = None,
) -> None:
    """Talk with a model. /help lists what can be typed; Ctrl-C interrupts an answer, Ctrl-D ends."""
    from lockstep.commands.terminal.conversation import Conversation
    from lockstep.engine.request import SamplingParams

    drawn = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    asked: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    asked |= dict(seed=seed, max_tokens=num_tokens)
    SamplingParams(**asked)  # ValueError before a model is loaded
    llm = load(
        model,
        weights=weights,
        kv_dtype=kv_dtype,
        threads=threads,
        max_context=max_context,
        ops=op,
        cache_dir=cache_dir,
        speculate=speculate,
        plan=plan,
        draft=draft,
        needs_chat=True,
        generation_config=generation_config,
        verify_weights=verify_weights,
    )
    conversation = Conversation(llm, first_settings(llm.sampling_defaults, asked), system)
    print(first_line(llm, conversation.settings), file=sys.stderr, flush=True)
    _greet(sys.stdin.isatty())
    while conversation.open:
        line = read_line(sys.stdin.isatty())
        if line is None:
            break
        conversation.hear(line)
    llm.close()


def first_settings(defaults: dict, asked: dict) -> dict:
    """The first settings of a conversation: the options of the command line, and for the rest the model's defaults."""
    from lockstep.engine.generation_config import for_talking

    return for_talking(defaults) | asked


def first_line(llm, settings: dict) -> str:
    """The line before the first message: the context, and how answers are sampled."""
    from lockstep.engine.generation_config import described

    shown = {
        name: settings.get(name, value)
        for name, value in (settings | llm.sampling_defaults).items()
        if name not in ("seed", "max_tokens")
    }
    return f"({'; '.join([*filter(None, context_words(llm)), described(shown)])})"


def _greet(interactive) -> None:
    if not interactive:
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() history and editing
    print("/help for commands, Ctrl-C interrupts an answer, Ctrl-D ends", file=sys.stderr)


def read_line(interactive):
    """The next line of standard input, or None at its end. Ctrl-C at the prompt only drops the line."""
    while True:
        try:
            line = input("> ") if interactive else input()
            line.encode()  # UnicodeError for bytes that were not UTF-8, which input() makes lone surrogates
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
