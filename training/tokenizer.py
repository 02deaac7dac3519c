"""Train the byte-level BPE tokenizer, or take one, and encode the text that prepare.py collected.

A piece never mixes a newline with anything else, and a run of two or more spaces is one piece, so that an indentation
is one token and a prompt may end after any line.
"""

import argparse
from pathlib import Path

import numpy as np
from prepare import PACKAGE_FILES, read_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
BATCH = 100
# newlines | indentation | identifier | digit | punctuation | other space
PIECES = r"\n+| {2,}| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s"


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat_prompt(request):
    """One user turn and the opening of the answer, exactly as the chat template in export.py writes them."""
    return f"{START_OF_TURN}user\n{request}{END_OF_TURN}\n{START_OF_TURN}assistant\n"


def encode_documents(tokenizer, documents):
    """Every document followed by the end-of-text token, as one array."""
    texts, ids = [row["text"] + END_OF_TEXT for row in documents], []
    # a few at a time: what the tokenizer returns takes a hundred bytes a token
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch_fast(texts[start : start + BATCH])
        ids += [np.asarray(e.ids, dtype=np.uint16) for e in encoded]
    return np.concatenate(ids)


def encode_pairs(tokenizer, pairs):
    """All pairs as one array, a flag per token that is part of an answer, and the position each pair starts at."""
    ids, is_answer, starts = [], [], []
    for pair in pairs:
        prompt = tokenizer.encode(chat_prompt(pair["request"])).ids
        answer = tokenizer.encode(pair["answer"] + END_OF_TURN).ids
        newline = tokenizer.encode("\n").ids
        starts.append(len(ids))
        ids += prompt + answer + newline
        is_answer += [0] * len(prompt) + [1] * len(answer) + [0] * len(newline)
    return np.asarray(ids, np.uint16), np.asarray(is_answer, np.uint8), np.asarray(starts, np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to take instead of training one")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()

    documents = {part: read_jsonl(options.data / f"{part}.jsonl") for part in ("train", "heldout")}
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    else:
        tokenizer = train_tokenizer([row["text"] for row in documents["train"]], options.vocab_size)
    tokenizer.save(str(options.data / "tokenizer.json"))
    for part in PACKAGE_FILES:
        if (options.data / f"{part}.jsonl").exists():
            documents[part] = read_jsonl(options.data / f"{part}.jsonl")
    for part, rows in documents.items():
        ids = encode_documents(tokenizer, rows)
        np.save(options.data / f"{part}.npy", ids)
        num_bytes = sum(len(row["text"].encode()) for row in rows)
        print(f"{part}: {len(ids)} tokens, {num_bytes / len(ids):.3f} bytes per token")
        if part in PACKAGE_FILES:
            continue
        ids, is_answer, starts = encode_pairs(tokenizer, read_jsonl(options.data / f"{part}_pairs.jsonl"))
        np.savez(options.data / f"{part}_pairs.npz", ids=ids, is_answer=is_answer, starts=starts)
        print(f"{part} pairs: {len(starts)} pairs, {len(ids)} tokens, {int(is_answer.sum())} in answers")


if __name__ == "__main__":
    main()
