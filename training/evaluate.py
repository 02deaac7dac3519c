"""Evaluate an exported folder on the held-out files: losses, perplexities, how often the MTP head is right, and
samples.

All numbers are for the bf16 weights as shipped, computed in float32, in windows of --length tokens without overlap
(every --every-th of them, where time is short).
"""

import argparse
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
    """Sums over the tokens with a weight: nats, bytes, MTP nats, and agreements of the MTP argmax."""
    total = dict.fromkeys(
        ["tokens", "nats", "right", "bytes", "mtp_tokens", "mtp_nats", "mtp_right", "drafts", "accepted"], 0.0
    )
    for x, w in zip(rows.split(ROWS), row_weights.split(ROWS), strict=True):
        hidden = model(x[:, :-2])
        main, ahead = model.logits(hidden), model.logits(model.mtp_hidden(hidden, x[:, 1:-1]))
        next_ids, after_ids, w1, w2 = x[:, 1:-1], x[:, 2:], w[:, 1:-1], w[:, 2:]
        total["tokens"] += w1.sum().item()
        total["bytes"] += (sizes[next_ids] * w1).sum().item()
        total["nats"] += (nats(main, next_ids) * w1).sum().item()
        total["right"] += ((main.argmax(-1) == next_ids) * w1).sum().item()
        total["mtp_tokens"] += w2.sum().item()
        total["mtp_nats"] += (nats(ahead, after_ids) * w2).sum().item()
        total["mtp_right"] += ((ahead.argmax(-1) == after_ids) * w2).sum().item()
        # the draft made at t is checked against the main model's choice at t + 1
        total["drafts"] += w2[:, :-1].sum().item()
        total["accepted"] += ((ahead.argmax(-1)[:, :-1] == main.argmax(-1)[:, 1:]) * w2[:, :-1]).sum().item()
    return total


def nats(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def report(name, t):
    loss, per_byte, mtp = t["nats"] / t["tokens"], t["nats"] / t["bytes"], t["mtp_tokens"]
    print(
        f"| {name} | {t['tokens']:.0f} | {loss:.3f} | {np.exp(loss):.2f} | {np.exp(per_byte):.3f} "
        f"| {per_byte / np.log(2):.3f} "
        f"| {t['right'] / t['tokens']:.1%} | {t['mtp_nats'] / mtp:.3f} | {t['mtp_right'] / mtp:.1%} "
        f"| {t['accepted'] / t['drafts']:.1%} |",
        flush=True,
    )


@torch.no_grad()
def greedy(model, tokenizer, prompt, num_tokens):
    """The greedy continuation, and the share of its tokens that the MTP head would have drafted."""
    ids = tokenizer.encode(prompt).ids
    start, stops = len(ids), [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)]
    while len(ids) < start + num_tokens and ids[-1] not in stops:
        # padding on the right changes nothing to its left
        padded = torch.tensor([ids + [0] * (-len(ids) % CHUNK)])
        ids.append(model.logits(model(padded)[0, len(ids) - 1]).argmax().item())
    x = torch.tensor([ids + [0] * (-len(ids) % CHUNK + CHUNK)])
    ahead = model.logits(model.mtp_hidden(model(x[:, :-CHUNK]), x[:, 1 : 1 - CHUNK]))[0].argmax(-1)
    drafts = [ahead[t - 2].item() == ids[t] for t in range(start + 1, len(ids))]
    return tokenizer.decode(ids[start:], skip_special_tokens=False), sum(drafts) / max(1, len(drafts))


def print_samples(model, tokenizer, num_tokens):
    for prompt in TEXT_PROMPTS + [chat_prompt(request) for request in REQUESTS]:
        text, accepted = greedy(model, tokenizer, prompt, num_tokens)
        print(f"\n--- {prompt!r} (MTP drafts accepted: {accepted:.0%})\n{text}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder that export.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py and tokenizer.py wrote")
    parser.add_argument("--length", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--every", type=int, default=1, help="use every n-th window")
    parser.add_argument("--sample-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)

    model, tokenizer = load_folder(options.model), Tokenizer.from_file(str(options.model / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    print("| held out | tokens | loss | ppl/token | ppl/byte | bits/byte | top-1 | MTP loss | MTP top-1 | MTP = main |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    documents = read_jsonl(options.data / "heldout.jsonl")
    total = None
    for kind in ("source", "documentation"):
        ids = encode_documents(tokenizer, [row for row in documents if row["kind"] == kind])
        rows, weights = windows_of(ids, np.ones(len(ids)), options.length)
        result = measure(model, rows[:: options.every], weights[:: options.every], sizes)
        report(kind, result)
        total = result if total is None else {key: total[key] + result[key] for key in total}
    report("all text", total)
    pairs = encode_pairs(tokenizer, read_jsonl(options.data / "heldout_pairs.jsonl"))
    report("answers of pairs", measure(model, *rows_of_pairs(*pairs, options.length), sizes))
    if options.sample_tokens:
        print_samples(model, tokenizer, options.sample_tokens)


if __name__ == "__main__":
    main()
