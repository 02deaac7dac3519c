"""`lockstep serve`: answer requests over HTTP."""

import os
import socket
import threading
from collections.abc import Callable
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
from lockstep.commands.terminal.output import counted

KEY_VARIABLE = "LOCKSTEP_API_KEY"


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
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="what all requests of a step need, up to 2 GiB, or one full context",
            help="Tokens of KV cache in all.",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the KV cache of earlier requests with the same first tokens.")
    ] = True,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="the model's, as far as memory holds it",
            help="Tokens that a prompt and its answer may have.",
        ),
    ] = None,
    generation_config: GenerationConfig = "auto",
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
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
    op: OpSwaps = None,
) -> None:
    """Answer requests over HTTP, as OpenAI's API does: see docs/server.md.

    The first SIGTERM, SIGHUP or Ctrl-C refuses new requests and lets those that run come to their end; a second SIGTERM
    or Ctrl-C ends at once.
    """
    from lockstep.serve.app import make_app
    from lockstep.serve.limits import Limits
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
        threads=threads,
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
    )
    names = model_names(name, model)
    origins, hosts = allowed("--cors-origin", cors_origin, origin), allowed("--allowed-host", allowed_host, host_name)
    service = Service(names[0], limits, keys(api_key), None if any_model else names, share_prefixes)
    app = make_app(service, origins, [host, socket.gethostname(), *hosts])
    serve(lambda: load(model, **sizes), service, app, host, port)


def serve(load_model, service, app, host, port) -> None:
    """Listens at once, answers when the model is loaded, and returns when a signal has ended the server."""
    from lockstep.serve.server import Server, bind, raise_open_file_limit

    raise_open_file_limit(service.limits)
    listening = bind(host, port)
    server, failed = Server(app, service), []
    threading.Thread(target=_open, args=(load_model, service, server, failed, listening), daemon=True).start()
    server.run(listening)
    if failed:
        raise failed[0]


def _open(load_model, service, server, failed, listening) -> None:
    """Loads the model, in a thread beside the event loop. Any error is added to `failed`, and ends the server."""
    try:
        service.open(load_model())
        if service.chat is not None:
            service.chat.grammars.warm()
    except BaseException as error:  # a library in Rust that panics raises no Exception
        failed.append(error)
        server.should_exit = True
        return
    print("\n".join([ready_line(service, *listening[0].getsockname()[:2]), *notes(service.llm)]), flush=True)


def ready_line(service, host, port) -> str:
    """The line that is printed when requests can be answered."""
    llm, host = service.llm, f"[{host}]" if ":" in host else host
    return (
        f"lockstep: {service.model_name} is ready at http://{host}:{port}/v1 ({context_words(llm)[0]}, "
        f"{counted(llm.max_requests, 'sequence')} at once)"
    )


def notes(llm) -> list[str]:
    """Further lines after it: how to get a longer context, and the sampling defaults."""
    from lockstep.engine.generation_config import described

    defaults, longer_context = described(llm.sampling_defaults), context_words(llm)[1]
    sampling = defaults and (
        f"what a request leaves open is as the model's makers ask: {defaults} (--generation-config "
        f"none: as OpenAI's API has it)"
    )
    return [f"lockstep: {words}" for words in (longer_context, sampling) if words]


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
