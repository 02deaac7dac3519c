"""`lockstep serve`: answer requests over HTTP."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.commands.options import (
    CacheDir,
    Draft,
    GenerationConfig,
    KvDtype,
    KvTokens,
    LargestContext,
    ModelName,
    Numa,
    OpSwaps,
    PlanFile,
    PrefixCache,
    RayAddress,
    ReceiptKey,
    Replicas,
    RopeFactors,
    Speculate,
    Threads,
    VerifyWeights,
    Weights,
    context_words,
    loader,
)
from lockstep.commands.terminal.output import counted

if TYPE_CHECKING:
    from lockstep.loading import LoadedModel
    from lockstep.serve.receipts.desk import ReceiptDesk
    from lockstep.serve.service import Service
    from lockstep.text.tokenizer.tokenizer import Tokenizer

KEY_VARIABLE = "LOCKSTEP_API_KEY"
ENGINE_FAILED = 1  # the exit code of a server that could answer nothing any more when it was ended


def command(
    *,
    model: ModelName = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; localhost: 127.0.0.1 and ::1; 0.0.0.0: every one that this machine has."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="The model's name for clients. Repeatable: all names work; the first is the default in answers.",
            show_default="its own name",
        ),
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Answer whatever name clients call the model, and repeat that name.")
    ] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            show_default=f"${KEY_VARIABLE}, or none needed",
            help="A key that clients must send. Repeatable.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            show_default="none",
            help="A web page that may call the server, such as https://example.org. Repeatable.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="addresses, localhost, --host and this machine's name",
            help="A name that clients may call the server by where no key is asked for; *: any. Repeatable.",
        ),
    ] = None,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes", help="Let requests of one API key reuse the cached prefixes of another key's requests."
        ),
    ] = False,
    max_connections_per_address: Annotated[
        int, typer.Option(min=1, help="Connections from one address; more may only ask for /health and /ready.")
    ] = 512,
    max_requests: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 32,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a step.")] = 512,
    max_queued: Annotated[int, typer.Option(min=1, help="Sequences that may wait; more are refused.")] = 256,
    max_queued_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens that may wait; more are refused.")] = 1
    << 18,
    max_answer_values: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens and log-probabilities of one answer, and log-probabilities of all running answers.",
        ),
    ] = 3 << 19,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Megabytes of a request's body.")] = 8,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600,
    drain_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that answers may go on after a signal to end.")
    ] = 30,
    stuck_timeout: Annotated[float, typer.Option(min=1, help="Seconds of one step that make /health red.")] = 120,
    kv_tokens: KvTokens = None,
    prefix_cache: PrefixCache = True,
    max_context: LargestContext = None,
    log_level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="What is logged to standard error: debug, info (a line for each request), warning or error.",
        ),
    ] = "info",
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Log a summary every 10 seconds in place of a line for each request.")
    ] = False,
    generation_config: GenerationConfig = "auto",
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    rope: RopeFactors = "auto",
    threads: Threads = None,
    numa: Numa = "off",
    cache_dir: CacheDir = None,
    speculate: Speculate = "off",
    plan: PlanFile = None,
    draft: Draft = None,
    early: Annotated[
        bool,
        typer.Option(
            "--early",
            help="Answer before all of a new model's file has been read for its "
            "content hash; such answers have no system_fingerprint.",
        ),
    ] = False,
    verify_weights: VerifyWeights = False,
    receipt_key: ReceiptKey = None,
    receipts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default="none", help="Add a receipt of each answer to this file, a line each."
        ),
    ] = None,
    replicas: Replicas = None,
    ray: RayAddress = None,
    files_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            show_default="a temporary folder",
            help="Keep uploaded files and batches here: batches go on when a server starts again.",
        ),
    ] = None,
    check: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="With several replicas: the share of all answers that another one verifies when it has nothing to do. "
            "One that computes wrongly is replaced.",
        ),
    ] = 0.0,
    op: OpSwaps = None,
) -> int:
    """Answer requests over HTTP, as OpenAI's API does: see docs/server.md.

    The first SIGTERM, SIGHUP or Ctrl-C refuses new requests and lets those that run come to their end; a second SIGTERM
    or Ctrl-C ends at once.
    """
    from lockstep.serve.app import make_app
    from lockstep.serve.limits import Limits
    from lockstep.serve.log import log_level as level_of
    from lockstep.serve.log import start_logging
    from lockstep.serve.request_target import host_name, origin
    from lockstep.serve.service import Service

    limits = Limits(
        max_queued=max_queued,
        max_queued_tokens=max_queued_tokens,
        max_body_bytes=max_body_mb << 20,
        request_seconds=request_timeout,
        drain_seconds=drain_timeout,
        stuck_seconds=stuck_timeout,
        max_address_connections=max_connections_per_address,
        max_answer_values=max_answer_values,
        max_pending_logprobs=max_answer_values,
    )
    sizes: dict[str, Any] = dict(
        ops=op,
        weights=weights,
        kv_dtype=kv_dtype,
        rope=rope,
        threads=threads,
        numa=numa,
        max_context=max_context,
        max_requests=max_requests,
        max_step_tokens=max_step_tokens,
        kv_tokens=kv_tokens,
        prefix_cache=prefix_cache,
        cache_dir=cache_dir,
        speculate=speculate,
        plan=plan,
        draft=draft,
        generation_config=generation_config,
        wait_for_content=not early,
        verify_weights=verify_weights,
        on_tokenizer=tell_no_chat,
    )
    names = model_names(name, model)
    origins, hosts = allowed("--cors-origin", cors_origin, origin), allowed("--allowed-host", allowed_host, host_name)
    start_logging(level_of(log_level))
    service = Service(names[0], limits, keys(api_key), None if any_model else names, share_prefixes, quiet)
    if receipt_key is not None or receipts is not None:
        service.receipts = receipt_desk(service, receipt_key, receipts)
    app = make_app(service, origins, [host, socket.gethostname(), *hosts], files_dir=files_dir)
    load_model = loader(replicas, ray, check)
    return serve(lambda: load_model(model, **sizes), service, app, host, port)


def receipt_desk(service: "Service", key: str | None, path: str | None) -> "ReceiptDesk":
    """What makes the server's receipts. ValueError for a key, OSError for a file, that cannot be used."""
    from lockstep.receipts.keys import load_signing_key
    from lockstep.serve.receipts.desk import ReceiptDesk

    return ReceiptDesk(service, None if key is None else load_signing_key(key), path)


def serve(load_model: Callable[[], "LoadedModel"], service: "Service", app: Any, host: str, port: int) -> int:
    """Listens at once, answers when the model is loaded, and returns when a signal has ended the server: 0, or
    ENGINE_FAILED. Raises what went wrong while the model was loaded."""
    from lockstep.serve.loading import Loading
    from lockstep.serve.server import Server, bind, raise_open_file_limit

    raise_open_file_limit(service.limits)
    listening = bind(host, port)
    address = listening[0].getsockname()[:2]

    def ready() -> None:
        with contextlib.suppress(OSError):  # nobody reads standard output any more
            print("\n".join(ready_lines(service, *address)), flush=True)

    loading = Loading(load_model, service, ready)
    Server(app, service, loading).run(listening)
    if loading.error is not None:
        raise loading.error
    return ENGINE_FAILED if service.has_failed else 0


def ready_lines(service: "Service", host: str, port: int) -> list[str]:
    """What is printed when requests can be answered: where, and below it what a user needs to know, a line each."""
    from lockstep.engine.generation_config import described

    llm, (context, longer_context) = service.loaded, context_words(service.loaded)
    of_all = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host)
    formats = f"weights {', '.join(llm.model.main_formats)}, KV cache {llm.model.kv_dtype}"
    defaults = described(llm.sampling_defaults)
    lines = {
        "page": f"{url(of_all or host, port)}/"
        + (f" and, from other machines, {url(socket.gethostname(), port)}/" if of_all else ""),
        "model": f"{llm.path} ({llm.model.config.model_type}, {formats})",
        "context": f"{context.removeprefix('context ')}, {counted(llm.max_requests, 'sequence')} at once",
        "": longer_context,
        "sampling": defaults
        and f"{defaults}: as the model's makers ask (--generation-config none: as OpenAI's API has it)",
        "answers": no_chat_words(service.tokenizer),
        "API key": "needed: Authorization: Bearer KEY" if service.api_keys else "none needed",
    }
    shown = [f"  {name:9} {words}" for name, words in lines.items() if words]
    return [f"lockstep: {service.model_name} is ready at {url(host, port)}/v1", *shown]


def url(host: str, port: int) -> str:
    """The URL of a host's port, without a path."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def no_chat_words(tokenizer: "Tokenizer | None") -> str | None:
    """What a model without a chat template, or tokenizer (None), can answer; None for one that can chat."""
    if tokenizer is None:
        return "only prompts of token ids (with return_token_ids in token ids): the model has no tokenizer"
    if tokenizer.only_decodes is not None:
        return f"only prompts of token ids: {tokenizer.only_decodes}"
    return None if tokenizer.has_chat_template else "only texts to be continued: the model has no chat template"


def tell_no_chat(tokenizer: "Tokenizer") -> None:
    """Logs what a model with a tokenizer cannot answer, long before it is ready; LLM does so for one without."""
    words = no_chat_words(tokenizer)
    if words is not None:
        logging.getLogger("lockstep.http").warning("this model answers %s", words)


def keys(given):
    """The API keys of the command line, or else the one of the environment. ValueError for an empty key."""
    found = list(given or ()) or [key for key in [os.environ.get(KEY_VARIABLE)] if key is not None]
    if not all(key.isascii() and key.strip() == key and key for key in found):
        raise ValueError("--api-key: expected ASCII characters without spaces around them")
    return found


def allowed(option: str, given: list[str] | None, read: Callable[[str], str]) -> list[str]:
    """The values of an option, each normalized by `read`; "*" stays. ValueError that begins with the option's name."""
    try:
        return [each if each == "*" else read(each) for each in given or ()]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def model_names(given: list[str] | None, model: str | None) -> list[str]:
    """The model's names for clients: those of the command line, or else its own. ValueError for an empty one."""
    if given and not all(name.strip() for name in given):
        raise ValueError('--name: expected a name, got ""')
    return list(given or ()) or [model_name(model)]


def model_name(model):
    """The model's own name: the last part of its path or hub name."""
    return "lockstep" if model is None else os.path.basename(str(model).rstrip("/")).removesuffix(".gguf") or str(model)
