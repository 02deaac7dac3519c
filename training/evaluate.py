"""Evaluate an exported folder on the held-out files: losses, perplexities, how often the MTP head is right, and
samples.

All numbers are for the bf16 weights as shipped, computed in float32, in windows of --length tokens without overlap
(every --every-th of them, where time is short).
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from export import load_folder
from tokenizer import END_OF_TEXT, END_OF_TURN, chat_prompt, encode_documents, encode_pairs, read_jsonl
from tokenizers import Tokenizer

TEXT_PROMPTS = ["import os\nimport sys\n\n\ndef main():\n", "class Stack:\n", "The :mod:`json` module"]
REQUESTS = [
    "Return the sum of all values in a list.",
    "Read a file and return its lines.",
    "Return True if the path is a directory.",
]
# rows computed together; the delta rule wants a multiple of 64 tokens
ROWS, CHUNK = 8, 64


def token_bytes(tokenizer):
    """How many bytes of text each id stands for; the special tokens stand for none."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.float32)
    special = tokenizer.get_added_tokens_decoder()
    for piece, i in tokenizer.get_vocab().items():
        # one character of a byte-level piece is one byte
        sizes[i] = 0 if i in special else len(piece)
    return torch.from_numpy(sizes)


def windows_of(ids, weights, length):
    """Rows of length + 2 ids that overlap by two, so that every target is counted once; a remainder is dropped."""
    starts = range(0, len(ids) - length - 1, length)
    pick = lambda x: torch.from_numpy(np.stack([x[s : s + length + 2] for s in starts]))
    return pick(ids.astype(np.int64)), pick(weights.astype(np.float32))


def rows_of_pairs(ids, is_answer, starts, length):
    """One pair per row, on its own as in a chat, padded to length + 2; a longer pair is cut."""
    rows, weights = np.zeros((2, len(starts), length + 2))
    for i, (start, end) in enumerate(zip(starts, np.append(starts[1:], len(ids)), strict=True)):
        end = min(end, start + length + 2)
        rows[i, : end - start], weights[i, : end - start] = ids[start:end], is_answer[start:end]
    return torch.from_numpy(rows).long(), torch.from_numpy(weights).float()


@torch.no_grad()
def measure(model, rows, row_weights, sizes):
    """Sums over the tokens with a weight: nats, bytes and hits of the argmax; with an MTP head also its own."""
    total = Counter()
    for x, w in zip(rows.split(ROWS), row_weights.split(ROWS), strict=True):
        hidden = model(x[:, :-2])
        main, next_ids, weights = model.logits(hidden), x[:, 1:-1], w[:, 1:-1]
        total["tokens"] += weights.sum().item()
        total["bytes"] += (sizes[next_ids] * weights).sum().item()
        total["nats"] += (nats(main, next_ids) * weights).sum().item()
        total["right"] += ((main.argmax(-1) == next_ids) * weights).sum().item()
        if model.mtp is not None:
            total.update(measure_mtp(model.logits(model.mtp_hidden(hidden, next_ids)), main, x[:, 2:], w[:, 2:]))
    return total


def measure_mtp(ahead, main, after_ids, weights):
    """The MTP head's sums: nats, hits, and how often its draft is what the main model chooses next."""
    return {
        "mtp_tokens": weights.sum().item(),
        "mtp_nats": (nats(ahead, after_ids) * weights).sum().item(),
        "mtp_right": ((ahead.argmax(-1) == after_ids) * weights).sum().item(),
        # the draft made at t is checked against the main model's choice at t + 1
        "drafts": weights[:, :-1].sum().item(),
        "accepted": ((ahead.argmax(-1)[:, :-1] == main.argmax(-1)[:, 1:]) * weights[:, :-1]).sum().item(),
    }


def nats(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def print_header(has_mtp):
    columns = ["held out", "tokens", "loss", "ppl/token", "ppl/byte", "bits/byte", "top-1"]
    columns += ["MTP loss", "MTP top-1", "MTP = main"] * has_mtp
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")


def report(name, t):
    loss, per_byte, mtp = t["nats"] / t["tokens"], t["nats"] / t["bytes"], t["mtp_tokens"]
    cells = [name, f"{t['tokens']:.0f}", f"{loss:.4f}", f"{np.exp(loss):.2f}", f"{np.exp(per_byte):.3f}"]
    cells += [f"{per_byte / np.log(2):.3f}", f"{t['right'] / t['tokens']:.1%}"]
    if mtp:
        cells += [f"{t['mtp_nats'] / mtp:.3f}", f"{t['mtp_right'] / mtp:.1%}", f"{t['accepted'] / t['drafts']:.1%}"]
    print("| " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def greedy(model, tokenizer, prompt, num_tokens):
    """The ids of the prompt with its greedy continuation, and where that starts."""
    ids = tokenizer.encode(prompt).ids
    start, stops = len(ids), [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)]
    while len(ids) < start + num_tokens and ids[-1] not in stops:
        # padding on the right changes nothing to its left
        padded = torch.tensor([ids + [0] * (-len(ids) % CHUNK)])
        ids.append(model.logits(model(padded)[0, len(ids) - 1]).argmax().item())
    return ids, start


@torch.no_grad()
def share_drafted(model, ids, start):
    """The share of the tokens from start that the MTP head would have drafted."""
    x = torch.tensor([ids + [0] * (-len(ids) % CHUNK + CHUNK)])
    ahead = model.logits(model.mtp_hidden(model(x[:, :-CHUNK]), x[:, 1 : 1 - CHUNK]))[0].argmax(-1)
    drafts = [ahead[t - 2].item() == ids[t] for t in range(start + 1, len(ids))]
    return sum(drafts) / max(1, len(drafts))


@torch.no_grad()
def print_samples(model, tokenizer, prompts, num_tokens):
    for prompt in prompts:
        ids, start = greedy(model, tokenizer, prompt, num_tokens)
        drafted = "" if model.mtp is None else f" (MTP drafts accepted: {share_drafted(model, ids, start):.0%})"
        print(f"\n--- {prompt!r}{drafted}\n{tokenizer.decode(ids[start:], skip_special_tokens=False)}", flush=True)


def report_files(model, tokenizer, sizes, data, length, every):
    """The files that prepare.py held out, by kind and together, and their pairs."""
    documents, total = read_jsonl(data / "heldout.jsonl"), Counter()
    for kind in ("source", "documentation"):
        ids = encode_documents(tokenizer, [row for row in documents if row["kind"] == kind])
        rows, weights = windows_of(ids, np.ones(len(ids)), length)
        result = measure(model, rows[::every], weights[::every], sizes)
        report(kind, result)
        total.update(result)
    report("all text", total)
    pairs = encode_pairs(tokenizer, read_jsonl(data / "heldout_pairs.jsonl"))
    report("answers of pairs", measure(model, *rows_of_pairs(*pairs, length), sizes))


def report_text(model, tokenizer, sizes, path, length, every):
    ids = np.asarray(tokenizer.encode(path.read_text(encoding="utf-8")).ids)
    rows, weights = windows_of(ids, np.ones(len(ids)), length)
    report(path.name, measure(model, rows[::every], weights[::every], sizes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder that export.py wrote")
    parser.add_argument("--data", type=Path, help="the folder that prepare.py and tokenizer.py wrote")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files of text")
    parser.add_argument("--length", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--every", type=int, default=1, help="use every n-th window")
    parser.add_argument("--sample-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)

    model, tokenizer = load_folder(options.model), Tokenizer.from_file(str(options.model / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    print_header(model.mtp is not None)
    if options.data:
        report_files(model, tokenizer, sizes, options.data, options.length, options.every)
    for path in options.text:
        report_text(model, tokenizer, sizes, path, options.length, options.every)
    if options.sample_tokens:
        prompts = TEXT_PROMPTS + [chat_prompt(request) for request in REQUESTS]
        print_samples(model, tokenizer, prompts, options.sample_tokens)


if __name__ == "__main__":
    main()
