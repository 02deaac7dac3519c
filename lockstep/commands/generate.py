"""`lockstep generate`: continue a text."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.commands.options import (
    AT_ZERO,
    DRAWN,
    CacheDir,
    Draft,
    KvDtype,
    MaxContext,
    ModelName,
    OpSwaps,
    PlanFile,
    ReceiptKey,
    RopeFactors,
    Speculate,
    Threads,
    VerifyWeights,
    Weights,
    check_model,
    load,
    say_unused,
)
from lockstep.commands.terminal.output import write
from lockstep.commands.terminal.receipts import receipt_file
from lockstep.commands.terminal.texts import read_or_itself, read_piped, read_text

if TYPE_CHECKING:
    from lockstep.engine.request import SamplingParams
    from lockstep.llm import LLM

DEFAULT_TOKENS, DEFAULT_CONTEXT = 128, 4096
MOST_CHARACTERS = 32 << 20  # of a prompt: several times the longest context that a model has


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[-]",
            help="- reads the prompt from standard input; so does neither -p nor -f, off a terminal.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt.")] = None,
    file: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="A file with the prompt.")] = None,
    num_tokens: Annotated[
        int | None,
        typer.Option(
            "-n", "--max-tokens", min=1, help="Most tokens to generate.", show_default="128, or as many as fit"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep only the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens that reach this sum.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less probable than this part of the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Another seed, another sample; the same seed, the same bits.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Do not end in the first N tokens.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of prompt and answer become less probable.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtract this from logits of tokens in the answer.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that a token is there.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID:BIAS", help="Add BIAS, from -100 to 100, to a token's logit. Repeatable."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="K", show_default=False, help="With --json: the K best alternatives of each token."),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Answer in JSON of this schema: a file, or {...} itself."
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", show_default=False, help="The whole answer matches this regular expression."),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default=False, help="The answer follows this grammar, GBNF or Lark: a file, or itself."
        ),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    rope: RopeFactors = "auto",
    threads: Threads = None,
    max_context: MaxContext = None,
    cache_dir: CacheDir = None,
    speculate: Speculate = "off",
    plan: PlanFile = None,
    draft: Draft = None,
    verify_weights: VerifyWeights = False,
    receipt: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Write a receipt of the answer, for lockstep verify, to this file."
        ),
    ] = None,
    receipt_key: ReceiptKey = None,
    receipt_tags: Annotated[
        bool, typer.Option("--receipt-tags", help="In the receipt: what names the first wrong token.")
    ] = False,
    receipt_detached: Annotated[
        bool, typer.Option("--receipt-detached", help="In the receipt: no tokens. Who verifies it needs them.")
    ] = False,
    receipt_hide_prompt: Annotated[
        bool, typer.Option("--receipt-hide-prompt", help="In the receipt: a salted hash in place of the prompt.")
    ] = False,
    nonce: Annotated[
        str | None, typer.Option(metavar="TEXT", show_default=False, help="In the receipt: a text of your own.")
    ] = None,
    op: OpSwaps = None,
) -> None:
    """Continue a text with a model, with the most probable tokens unless options say otherwise, whatever sampling the
    model's makers ask for (chat and serve begin with that).

    The continuation streams to standard output; progress and speed go to standard error.
    """
    from lockstep.engine.request import SamplingParams

    model, source = (None, "-") if model == "-" and source is None else (model, source)
    form = answer_form(json_schema, regex, grammar)
    if prompt is None and file is None:
        check_model(model)
    text = read_prompt(prompt, file, source)
    fields: dict[str, Any] = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        min_tokens=min_tokens,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=parse_bias(logit_bias or ()),
    )
    SamplingParams(**fields, max_tokens=num_tokens or DEFAULT_TOKENS)  # ValueError before a model is loaded
    say_what_is_unused(invoked, temperature, as_json, speculate)
    parts = dict(tags=receipt_tags, is_detached=receipt_detached, hides_prompt=receipt_hide_prompt, nonce=nonce)
    receipts = receipt_file(invoked, receipt, receipt_key, parts)
    needed = None if max_context else needed_context(model, text, num_tokens or DEFAULT_TOKENS)
    # a single prompt cannot reuse a prefix from memory, only from the disk
    llm = load(
        model,
        weights=weights,
        kv_dtype=kv_dtype,
        rope=rope,
        threads=threads,
        max_context=max_context,
        needed_context=needed,
        needs_text=True,
        ops=op,
        prefix_cache=cache_dir is not None,
        cache_dir=cache_dir,
        speculate=speculate,
        plan=plan,
        draft=draft,
        verify_weights=verify_weights,
        packs_lazily=True,
    )
    source_of_seed = invoked.get_parameter_source("seed")
    if receipts is not None and source_of_seed is not None and source_of_seed.name == "DEFAULT":
        fields |= receipts.drawn_seed(llm, text)
    run(llm, text, num_tokens, fields, form, receipts, echo=echo, as_json=as_json)


def say_what_is_unused(invoked: typer.Context, temperature: float, as_json: bool, speculate: str) -> None:
    """Says which given options have no effect beside the others."""
    if temperature == 0:
        say_unused(invoked, DRAWN, AT_ZERO)
    say_unused(invoked, *((["echo"], "with --json") if as_json else (["logprobs"], "without --json")))
    if speculate == "off":
        say_unused(invoked, ["draft"], "without --speculate")


def answer_form(json_schema: str | None, regex: str | None, grammar: str | None) -> tuple[str, str] | None:
    """(option, its grammar as `Grammars.mask` takes it) of the one that is given; None without any. ValueError for more
    than one, and for one that is wrong."""
    options = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    found = {option: value for option, value in options.items() if value is not None}
    if len(found) > 1:
        raise ValueError(f"expected at most one of --json-schema, --regex and --grammar, got {' and '.join(found)}")
    for option, value in found.items():
        from lockstep.text.grammars import structured  # takes a while to import

        with structured.errors_about(option):
            form = _MAKERS[option](structured, value)
            check_form(form, is_quoted=option == "--grammar")
            return option, form
    return None


_MAKERS: dict[str, Callable[[Any, str], str]] = {
    "--json-schema": lambda structured, value: structured.json_schema(read_schema(value)),
    "--regex": lambda structured, value: structured.regex(value),
    "--grammar": lambda structured, value: structured.lark_or_gbnf(
        read_or_itself(value, ":" in value, "a grammar, which has a colon")
    ),
}


def check_form(form: str, is_quoted: bool) -> None:
    """ValueError for a grammar that is wrong, before a model is loaded for it. is_quoted: whether to show the lines of
    the grammar that are wrong; otherwise the reason is one line."""
    from llguidance import LLMatcher

    from lockstep.text.grammars.matchers import readable

    if wrong := LLMatcher.validate_grammar(form):
        reason = readable(wrong, shows_lines=is_quoted)
        raise ValueError(reason if is_quoted else " ".join(reason.split()))


def read_schema(value: str) -> Any:
    """The JSON value in a file, or in the argument itself."""
    try:
        return json.loads(read_or_itself(value, value.lstrip().startswith("{"), "a JSON schema, which begins with {"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON schema, this is not JSON: {error}") from None


@contextlib.contextmanager
def constrained_params(
    llm: "LLM", params: "SamplingParams", form: tuple[str, str] | None
) -> Iterator["SamplingParams"]:
    """The params, held to a form of `answer_form` inside of the `with` block."""
    if form is None:
        yield params
        return
    from lockstep.text.grammars.structured import Grammars, errors_about

    with contextlib.closing(Grammars(llm.tokenizer, llm.engine.eos_ids, llm.vocab_size)) as grammars:
        with errors_about(form[0]):
            mask = grammars.mask(form[1])
        yield dataclasses.replace(params, logits_mask=mask)


def run(llm, text, num_tokens, fields, form, receipts, *, echo, as_json) -> None:
    """Generates and prints an answer. fields: arguments of SamplingParams; form: of `answer_form`; receipts: None, or
    the ReceiptFile for its receipt."""
    from lockstep.commands.terminal.answer import answer
    from lockstep.commands.terminal.packing import finish_packing
    from lockstep.engine.request import SamplingParams

    ids = llm.encode(text)
    if num_tokens is None:
        num_tokens = min(DEFAULT_TOKENS, checked_room(llm, len(ids)))
    params = SamplingParams(max_tokens=num_tokens, **fields)
    show = (lambda piece: None) if as_json else write
    if ignored := ignored_sampling(llm.makers_sampling(), params):
        print(f"(greedy, not as the model's makers ask: {ignored})", file=sys.stderr, flush=True)
    if echo:
        show(text)
    with constrained_params(llm, params, form) as params:
        stream, timing = answer(llm, ids, params, show, receipt=receipts is not None)
    if not as_json:
        write("\n")  # before lines of standard error, which may go to the same place
    has_receipt = receipts and stream.request.error is None
    made = receipts.write(llm, stream.request, params) if has_receipt else {}
    if as_json:
        write(json.dumps(described(stream, timing) | made) + "\n")
    print(timing, file=sys.stderr, flush=True)
    if form and stream.request.finish_reason == "length":
        cut = f"the answer was cut at {timing.num_output} tokens, perhaps before {form[0]} is fulfilled"
        print(f"lockstep: {cut}; -n N allows more", file=sys.stderr)
    if stream.request.error is None:
        finish_packing(llm)
    llm.close()
    if stream.request.error is not None:
        raise ValueError(stream.request.error)


def checked_room(llm: "LLM", num_prompt: int) -> int:
    """How many tokens of the context a prompt leaves for its answer. ValueError if there are none."""
    room = llm.max_context - num_prompt
    if room < 1:
        more = ", or a larger --max-context" if llm.max_context < llm.model.config.max_positions else ""
        raise ValueError(
            f"the prompt has {num_prompt} tokens, which leave no room for an answer in the context of "
            f"{llm.max_context}: expected a shorter prompt{more}"
        )
    return room


def ignored_sampling(recommended: dict[str, Any], params: "SamplingParams") -> str:
    """In words: the sampling that the model's makers recommend, where a greedy answer ignores it. Empty where options
    ask for sampling, or the recommendation gives the same answer."""
    from lockstep.engine.generation_config import DRAWS, described

    is_greedy = recommended.get("temperature") == 0
    names = {name for name in recommended if name not in DRAWS or not is_greedy or name == "temperature"}
    is_followed = all(recommended[name] == getattr(params, name) for name in names)
    return "" if params.temperature > 0 or is_followed else described(recommended)


def read_prompt(prompt, file, source):
    """The prompt of the one option that gives it, or of standard input, which - names and which is read without it
    where it is no terminal. ValueError for none or several, or for a prompt that is not text."""
    if source not in (None, "-"):
        raise ValueError(f"{source!r}: expected a prompt as -p TEXT, -f FILE or -, and at most one model")
    num_given = sum(each is not None for each in (prompt, file, source))
    is_piped = num_given == 0 and sys.stdin is not None and not sys.stdin.isatty()
    if num_given > 1 or (num_given == 0 and not is_piped):
        raise ValueError("expected one prompt: -p TEXT, -f FILE or standard input, as a pipe or as - in its place")
    text = prompt if prompt is not None else read_piped() if is_piped else read_text(source or file)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the prompt has {len(text):,} characters, expected at most {MOST_CHARACTERS:,}")
    if not text:
        where = "standard input is empty: expected a prompt there, or as -p TEXT or -f FILE"
        raise ValueError(where if is_piped else "the prompt is empty")
    return text


def parse_bias(pairs):
    """Values of --logit-bias, ["ID:BIAS", ...], as {token id: bias}."""
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition(":")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f"--logit-bias {pair}: expected ID:BIAS, such as 42:-100") from None
    return biases


def needed_context(model, text, num_tokens):
    """Tokens of context for a prompt and its answer. A short text is not tokenized: a token has at least one byte."""
    if len(text.encode("utf-8", "replace")) + num_tokens < DEFAULT_CONTEXT:
        return DEFAULT_CONTEXT
    needed = len(tokenizer_of(model).encode(text)) + num_tokens
    return max(DEFAULT_CONTEXT, -(-needed // 64) * 64)


def tokenizer_of(model):
    """A model's tokenizer, without loading the model."""
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.text.tokenizer.tokenizer import find_tokenizer
    from lockstep.weights.hub import resolve_model

    path = resolve_model(model)
    return find_tokenizer(path, open_checkpoint(path).metadata)


def described(stream, timing):
    """The answer as a JSON object."""
    request = stream.request
    made = dict(
        text=stream.text,
        token_ids=request.output_ids,
        logprobs=request.logprobs,
        finish_reason=request.finish_reason,
        num_prompt_tokens=timing.num_prompt,
        num_output_tokens=timing.num_output,
        num_cached_tokens=timing.num_cached,
        prefill_tokens_per_second=round(timing.prefill_rate, 1),
        decode_tokens_per_second=round(timing.decode_rate, 1),
        seconds_to_first_token=round(timing.first_token, 4),
    )
    made |= dict(num_drafted=timing.num_drafted, num_accepted=timing.num_accepted) if timing.num_drafted else {}
    made |= dict(top_logprobs=request.top_logprobs) if request.top_logprobs else {}
    return made if request.error is None else made | dict(error=request.error)
