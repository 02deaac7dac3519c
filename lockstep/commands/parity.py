"""`lockstep parity`: shows that every path gives the same bits, or names the first op that does not."""

import json
from typing import Annotated

import numpy as np
import typer

from lockstep.commands.options import ModelName, OpSwaps, Weights, load, parse_swaps, say_unused
from lockstep.commands.terminal.tables import made_table, report_console
from lockstep.lab import parity as paths
from lockstep.ops import BACKENDS
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

ANSWER_TOKENS = 64
PROMPT = '''"""Heap queue algorithm (a.k.a. priority queue)."""

def heappush(heap, item):
    """Push item onto heap, maintaining the heap invariant."""
    heap.append(item)
    _siftdown(heap, 0, len(heap)-1)

def heappop(heap):
    """Pop the smallest item off the heap, maintaining the heap invariant."""
    lastelt = heap.pop()    # raises appropriate IndexError if heap is empty
    if heap:
        returnitem = heap[0]
        heap[0] = lastelt
        _siftup(heap, 0)
        return returnitem
    return lastelt
'''


def encodes(llm) -> bool:
    """Whether a model has a tokenizer that encodes."""
    return llm.has_tokenizer and llm.tokenizer.only_decodes is None


def prompt_ids(llm, prompt, length):
    """Token ids of the prompt, repeated or cut to `length` if it is given; random ids for a model without a tokenizer
    that encodes."""
    if not encodes(llm):
        return np.random.default_rng(0).integers(0, llm.vocab_size, length or 200).tolist()
    ids = llm.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    return (ids * (length // len(ids) + 1))[:length] if length else ids


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The prompt to run.")] = PROMPT,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the prompt, which is repeated or cut to this length.")
    ] = None,
    weights: Weights = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="The most threads of a path but one, which has twice as many.",
            show_default="all cores",
        ),
    ] = None,
    op: OpSwaps = None,
    first_difference: Annotated[
        str | None,
        typer.Option(
            metavar="A:B", help="Instead: the first op that differs between two backends, e.g. cpu:reference."
        ),
    ] = None,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate", help="Instead: answers with drafts, against an answer without; --tokens says how long."
        ),
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 20, help="With --speculate: the least tokens of an answer.", show_default=str(ANSWER_TOKENS)
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one prompt along every path and compare each, bit for bit, with one token at a time. Exit 1 if one
    differs."""
    if speculate and first_difference:
        raise ValueError("--speculate and --first-difference: expected one of them")
    if tokens is not None and not speculate:
        raise ValueError("--tokens: expected only with --speculate")
    tokens = tokens or ANSWER_TOKENS
    needed = (length or 0) + (tokens + PAGE_TOKENS if speculate else 0)
    llm = load(model, weights=weights, needed_context=max(4096, needed))
    if not encodes(llm):
        say_unused(invoked, ["prompt"], "with a model whose tokenizer does not encode: token ids are random")
    ids = prompt_ids(llm, prompt, length)
    if not 2 <= len(ids) <= llm.max_context:
        raise ValueError(f"prompt: expected 2 to {llm.max_context} tokens, got {len(ids)}")
    swaps, max_threads = parse_swaps(op), threads or llm.engine.team.num_threads
    if speculate:
        report_drafts(llm.model, ids, tokens, swaps, max_threads, as_json)
    elif first_difference:
        report_first_difference(llm.model, ids, first_difference, swaps, max_threads, as_json)
    else:
        report_paths(llm.model, ids, swaps, max_threads, as_json)


def report_paths(model, ids, swaps, max_threads, as_json):
    """Prints the table of all paths; exits with 1 if one differs."""
    console = report_console(stderr=as_json)
    columns = ("path", "threads", "max_abs_diff", "argmax", "digest", "bits")
    table = made_table(f"{len(ids)} tokens, every path", *columns)
    results = []
    with console.status("running paths") as status:
        for result in paths.run_parity(model, ids, max_threads, swaps):
            status.update(f"after {result.path.name}")
            results.append(result)
            table.add_row(
                result.path.name,
                str(result.path.threads),
                f"{result.max_abs_diff:g}",
                f"{result.argmax_agree:.0%}",
                result.digest[:12],
                _bits(result),
            )
    identical = all(r.identical for r in results)
    if as_json:
        rows = [
            vars(result) | dict(path=result.path.name, threads=result.path.threads, identical=result.identical)
            for result in results
        ]
        print(json.dumps(rows))
    else:
        console.print(table)
        console.print(
            f"[green]{len(results)} paths, one answer: logits, sampled tokens and cache, bit for bit."
            if identical
            else "[red]Paths differ."
        )
    raise typer.Exit(0 if identical else 1)


def report_drafts(model, ids, tokens, swaps, max_threads, as_json):
    """Prints the table of answers with drafts; exits with 1 if one differs."""
    from lockstep.lab import parity_drafts as drafts

    console = report_console(stderr=as_json)
    columns = ("drafts", "most", "at T", "right", "max_abs_diff", "digest", "bits")
    tokens = drafts.answer_tokens(len(ids), tokens)
    table = made_table(f"{len(ids)} tokens and {tokens} more, with and without drafts", *columns)
    results = []
    with console.status("running an answer without drafts") as status:
        for result in drafts.run_draft_parity(model, ids, tokens, max_threads, swaps):
            status.update(f"after {result.path.name}")
            results.append(result)
            table.add_row(
                result.path.source,
                str(result.path.num_drafts),
                f"{result.path.temperature:g}",
                f"{result.num_accepted} of {result.num_drafted}",
                f"{result.max_abs_diff:g}",
                result.digest[:12],
                _bits(result),
            )
    identical = all(r.identical for r in results)
    if as_json:
        print(json.dumps([vars(r) | dict(path=r.path.name, **vars(r.path), identical=r.identical) for r in results]))
    else:
        console.print(table)
        console.print(
            f"[green]{len(results)} answers, the same with drafts and without: tokens, log-probabilities and cache, "
            "bit for bit."
            if identical
            else "[red]Drafts change the answer."
        )
    raise typer.Exit(0 if identical else 1)


def _bits(result):
    """The table's cell about a path's bits."""
    return "[green]same" if result.identical else f"[red]DIFFERS[/] ({_listed(result.differing)})"


def _listed(names, most: int = 2):
    """The first `most` names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def report_first_difference(model, ids, backends, swaps, threads, as_json):
    """Prints the first op that differs; exits with 1 if there is one."""
    names = backends.split(":")
    if len(names) != 2 or not set(names) <= set(BACKENDS):
        raise ValueError(f"--first-difference {backends!r}: expected two of {', '.join(BACKENDS)} as A:B")
    found = paths.first_difference(model, ids, [(names[0], swaps), (names[1], None)], threads)
    if as_json:
        print(json.dumps(found and vars(found) | dict(op=str(found.op), tensor=found.tensor.name)))
    elif found:
        report_console().print(
            f"[red]op {found.index}[/] {found.op}\nfirst difference in [bold]{found.tensor.name}[/] at row "
            f"{found.row}, column {found.column}: {found.values[0]!r} and {found.values[1]!r}; "
            f"{found.num_different} values differ"
        )
    else:
        report_console().print(
            f"[green]Every op of {names[0]} and {names[1]} gives the same bits over {len(ids)} tokens."
        )
    raise typer.Exit(1 if found else 0)
