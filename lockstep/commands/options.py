"""Options that several commands share, and `load`, which loads a model with them."""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from lockstep.llm import LLM
    from lockstep.loading import LoadedModel

M = TypeVar("M", bound="LoadedModel")
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        show_default=False,
        help="A Hugging Face folder, a .gguf file, a hub name like org/model or org/model:Q8_0, ollama:NAME or "
        "lmstudio:PUBLISHER/NAME. Default: the bundled model.",
    ),
]


def weights_format(text: str) -> str:
    """A value of --weights, in small letters. ValueError for another one, before a model is looked for."""
    from lockstep.formats.choice import CHOICES  # it takes a while to import

    if text.lower() not in CHOICES:
        raise ValueError(
            f"weights {text!r}: expected one of {', '.join(CHOICES)}; other formats are not made from a model, they "
            "come with a GGUF file that has them, such as org/model:Q4_K_M"
        )
    return text.lower()


Weights = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        callback=weights_format,
        help="How linear layers multiply: auto (as stored), f32, bf16, q8_0 or q4_0.",
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="KV cache in f32, bf16 or q8 (8 bits).", show_default="bf16; f32 with --weights f32"
    ),
]
RopeFactors = Annotated[
    str,
    typer.Option(
        "--rope",
        metavar="FACTORS",
        help="Of a model whose rope has short and long factors (Phi): short, with a context no longer than they are "
        "for; auto, those that the model's context calls for.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="Threads, at most one for each core.", show_default="all cores")
]
Numa = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="Where memory has several nodes: off, or interleave, which deals the pages of weights and caches to all.",
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that prompt and answer may have together.", show_default="what is needed"),
]
LargestContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="the model's, as far as memory holds it",
        help="Tokens that a prompt and its answer may have.",
    ),
]
KvTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="what all requests of a step need, up to 2 GiB, or one full context",
        help="Tokens of KV cache in all.",
    ),
]
PrefixCache = Annotated[bool, typer.Option(help="Reuse the KV cache of earlier requests with the same first tokens.")]
GenerationConfig = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="Whose sampling is the default: auto (the model's makers'), none, or a folder with a "
        "generation_config.json.",
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", show_default="none", help="Keep computed prompts in this folder, for this and later runs."
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="Guess tokens ahead and check them together: off; lookup (what followed the same few tokens before in the "
        "text); mtp (the model's own multi-token-prediction head); auto (both, or lookup where there is no head); or a "
        "smaller model of the same vocabulary. No answer changes.",
    ),
]
Draft = Annotated[
    int | None,
    typer.Option(
        min=1, max=15, help="With --speculate: guesses for a request in a step.", show_default="as many as pay, up to 7"
    ),
]
PlanFile = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        show_default="none",
        help="Run on the grids of a solved quantization plan, as lockstep ptq writes them (winner.json).",
    ),
]
VerifyWeights = Annotated[
    bool,
    typer.Option(
        "--verify-weights", help="Read all of the weights and check their hashes, although they were checked before."
    ),
]
ReceiptKey = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", show_default=False, help="Sign receipts with this Ed25519 key (lockstep receipt key makes one)."
    ),
]
OpSwaps = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND=BACKEND",
        help="Run an op another way, such as linear=reference or attention=per_token. Repeatable.",
    ),
]


def parse_swaps(swaps):
    """Values of --op, ["linear=reference", ...], as {"linear": "reference", ...}."""
    backend_of = {}
    for swap in swaps or ():
        kind, _, backend = swap.partition("=")
        if not kind or not backend:
            raise ValueError(f"--op {swap}: expected KIND=BACKEND, such as linear=reference")
        if kind in backend_of:
            raise ValueError(f"--op {swap}: {kind} is given twice, {backend_of[kind]} before")
        backend_of[kind] = backend
    return backend_of


def context_words(llm) -> tuple[str, str | None]:
    """("context 4096 of the model's 32768 tokens", how to get a longer context); the second is None where the context
    cannot be longer, or --max-context set it."""
    size, most = llm.context, llm.model.config.max_positions
    part = "" if size.num_tokens == most else f" of the model's {most}"
    smaller = "" if llm.model.kv_dtype == "q8" else "--kv-dtype q8, "
    more = {
        "kv_tokens": "more --kv-tokens would give a longer context",
        "positions": "--max-context would give a longer context, whose later positions have no proven accuracy",
        "memory": f"{smaller}more free memory, or --max-context in spite of it, would give a longer context",
    }
    return f"context {size.num_tokens}{part} tokens", more.get(size.limit)


DRAWN = ("seed", "top_k", "top_p", "min_p")  # options of how a token is drawn
AT_ZERO = "at temperature 0, which always takes the most probable token"  # why these have no effect there


def say_unused(invoked: typer.Context, names: Iterable[str], why: str) -> None:
    """Says that those of the named parameters which the command line gives have no effect. why: such as "without
    --json"."""
    options = {parameter.name: parameter.opts[-1] for parameter in invoked.command.params}
    for name in names:
        source = invoked.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            print(f"lockstep: {options[name]} has no effect {why}", file=sys.stderr)


Replicas = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        show_default="none, the engine runs in this process",
        help="Processes with an engine each. The answers of one that dies go on, byte for byte, in the others.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        show_default="none, replicas are processes of this machine",
        help="Have Ray carry the replicas: local (a cluster of its own here), auto or HOST:PORT.",
    ),
]


def check_model(model: str | None) -> None:
    """ValueError for a MODEL that is none, on a command line that gives no prompt: perhaps it was meant to be one.
    Nothing is loaded, and the hub is not asked for a name that may be one of its models."""
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.weights.hub import parse_hub_name, resolve_model

    if model is None or (parse_hub_name(model) is not None and not os.path.exists(os.path.expanduser(model))):
        return
    try:
        open_checkpoint(resolve_model(model))
    except ValueError as error:
        raise ValueError(f"{error} (it was read as MODEL; a prompt is given as -p TEXT or -f FILE)") from None


def loader(replicas: int | None, ray: str | None, check_share: float = 0.0) -> Callable[..., "LoadedModel"]:
    """`load`, or a function like it that gives the model replicas: processes of this machine or of a Ray cluster.
    check_share: see `Fleet`."""
    if replicas is None and ray is None:
        if check_share:
            raise ValueError("--check: replicas verify one another's answers: give --replicas or --ray, too")
        return load

    def load_front(model: str | None, **options: Any) -> "LoadedModel":
        from lockstep.replicas.front import FrontModel

        carrier = None
        if ray is not None:
            from lockstep.replicas.ray_carrier import RayCarrier

            carrier = RayCarrier(ray)
        count = replicas or 1
        kind = functools.partial(FrontModel, num_replicas=count, carrier=carrier, check_share=check_share)
        return load_as(kind, model, num_replicas=1 if ray else count, **options)

    return load_front


def load(model: str | None, **options: Any) -> "LLM":
    """The LLM, with progress on stderr. options: see `load_as`."""
    from lockstep.llm import LLM

    return load_as(LLM, model, **options)


def load_as(
    kind: Callable[..., M],
    model: str | None,
    *,
    ops: list[str] | None = None,
    max_requests: int = 1,
    wait_for_content: bool = False,
    max_context: int | None = None,
    needed_context: int | None = None,
    num_replicas: int = 1,
    **options: Any,
) -> M:
    """The model, with progress on stderr. kind: makes it, as LLM does. num_replicas: how many engines it has on this
    machine. ops: values of --op; options: arguments of LLM.

    wait_for_content: whether to return only when the model's content hash is known. max_context: tokens that the user
    asks for; needed_context: tokens that the command needs where the user does not say. A model may have fewer.
    """
    from lockstep.native.host import num_cores
    from lockstep.progress import Progress

    if (threads := options.get("threads") or 0) > num_cores():
        print(f"lockstep: {threads} threads on {num_cores()} cores: {num_cores()} run", file=sys.stderr)
    elif threads * num_replicas > num_cores():
        print(f"lockstep: {threads * num_replicas} threads on {num_cores()} cores only take turns", file=sys.stderr)
    options |= dict(max_context=max_context or needed_context, max_requests=max_requests)
    llm = kind(model, ops=parse_swaps(ops), **options)
    with Progress() as progress:
        if wait_for_content:
            llm.content.wait(progress)
    if (max_context or 0) > (positions := llm.model.config.max_positions):
        print(
            f"lockstep: --max-context {max_context} has the effect of {positions}: the model has no more positions",
            file=sys.stderr,
        )
    return llm
