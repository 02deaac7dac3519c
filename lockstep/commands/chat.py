"""`lockstep chat`: a conversation in the terminal, or the answer to one question."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.commands.options import (
    AT_ZERO,
    DRAWN,
    CacheDir,
    Draft,
    GenerationConfig,
    KvDtype,
    ModelName,
    OpSwaps,
    PlanFile,
    RopeFactors,
    Speculate,
    Threads,
    VerifyWeights,
    Weights,
    context_words,
    load,
    say_unused,
)
from lockstep.commands.terminal.texts import read_piped

if TYPE_CHECKING:
    from lockstep.commands.terminal.conversation import Conversation
    from lockstep.commands.terminal.entries import Entries
    from lockstep.llm import LLM

ANSWER_TOKENS = 1024  # of answers without thoughts, unless --max-tokens allows others
MODELS = "the model's"  # shown as the default of sampling options


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEXT",
            show_default=False,
            help="Answer this question, with what is piped to standard input below it, and end.",
        ),
    ] = None,
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
    num_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            min=1,
            help="Most tokens of an answer.",
            show_default=f"{ANSWER_TOKENS}; with thoughts as many as fit",
        ),
    ] = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    rope: RopeFactors = "auto",
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
    """Talk with a model. /help lists what can be typed; Ctrl-C interrupts an answer, Ctrl-D ends.

    With -p it answers one question: the answer goes to standard output, all else to standard error.
    """
    from lockstep.commands.terminal.conversation import Conversation
    from lockstep.engine.request import SamplingParams

    drawn = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    asked: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    asked |= dict(seed=seed)
    SamplingParams(**asked)  # ValueError before a model is loaded
    question = None if prompt is None else with_piped(prompt)
    llm = load(
        model,
        weights=weights,
        kv_dtype=kv_dtype,
        rope=rope,
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
        packs_lazily=True,
    )
    asked |= dict(max_tokens=num_tokens or most_tokens(llm))
    conversation = Conversation(llm, first_settings(llm.sampling_defaults, asked), system)
    say_what_is_unused(invoked, conversation.is_greedy, speculate)
    with contextlib.closing(llm):
        if question is not None:
            answer_once(conversation, question)
        else:
            print(first_line(llm, conversation.settings), file=sys.stderr, flush=True)
            converse(conversation, entries_of_input())


def say_what_is_unused(invoked: typer.Context, is_greedy: bool, speculate: str) -> None:
    """Says which given options have no effect beside the others and the model's own sampling."""
    if is_greedy:
        say_unused(invoked, DRAWN, AT_ZERO)
    if speculate == "off":
        say_unused(invoked, ["draft"], "without --speculate")


def with_piped(question: str) -> str:
    """The question, and below it, after an empty line, what is piped to standard input. ValueError if both are
    empty."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else read_piped()
    text = "\n\n".join(filter(str.strip, [question, piped.rstrip("\r\n")]))
    if not text:
        raise ValueError("-p: expected a question, got an empty text")
    return text


def answer_once(conversation: "Conversation", question: str) -> None:
    """Prints the answer to one question. ValueError if there is none, KeyboardInterrupt if Ctrl-C ended it."""
    from lockstep.commands.terminal.conversation import tell
    from lockstep.commands.terminal.packing import finish_packing

    turn = conversation.ask(question)
    if turn.is_interrupted:
        raise KeyboardInterrupt
    if turn.error is not None or not turn.content:
        raise ValueError(turn.error or turn.shortfall)
    for remark in turn.remarks:
        tell(remark)
    finish_packing(conversation.llm)


def converse(conversation: "Conversation", entries: "Entries") -> None:
    """Gives a conversation all entries, until it or they end. Ctrl-C ends only an answer that a user has typed for;
    where entries are piped, KeyboardInterrupt."""
    from lockstep.commands.terminal.conversation import tell
    from lockstep.commands.terminal.packing import packing_beside

    with packing_beside(conversation.llm) as begin_packing:
        while conversation.open:
            try:
                if (entry := entries.read()) is None:
                    break
                conversation.hear(entry)
                begin_packing()
            except KeyboardInterrupt:  # beside an answer, or a second time
                if not entries.is_typed:
                    raise
                tell("interrupted")
            if conversation.was_interrupted and not entries.is_typed:
                raise KeyboardInterrupt


def entries_of_input() -> "Entries":
    """The entries of standard input: typed where it and a stream that shows them are a terminal, else piped."""
    from lockstep.commands.terminal.conversation import COMMANDS
    from lockstep.commands.terminal.entries import PipedEntries, TypedEntries

    if sys.stdin is None:
        raise ValueError("standard input is closed: expected questions there, or one as -p TEXT")
    if not (sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())):
        return PipedEntries()
    print("/help lists commands, Ctrl-C interrupts an answer, Ctrl-D ends", file=sys.stderr, flush=True)
    return TypedEntries(names[0] for names, *_ in COMMANDS)


def most_tokens(llm: "LLM") -> int:
    """The most tokens of an answer by default: thoughts may take all of the context."""
    from lockstep.text.reasoning import marks_of

    return llm.max_context if any(map(marks_of, llm.tokenizer.chat_templates.values())) else ANSWER_TOKENS


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
