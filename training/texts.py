"""Write the two texts of the quantization studies, calibration.txt and evaluation.txt, from the held-out files.

The hash of a file's name says which text it belongs to, so no file is in both. Each file is cut, after a line, at the
same number of bytes: the largest that keeps the text within --size. Files follow each other in the order of that hash,
sources among documentation, so that any run of windows is a mixture.
"""

import argparse
import hashlib
from pathlib import Path

from tokenizer import read_jsonl

TEXTS = ("calibration", "evaluation")


def name_hash(row):
    # salted: the plain hash of the name has already chosen the held-out files
    return int(hashlib.sha256(f"texts/{row['name']}".encode()).hexdigest(), 16)


def first_lines(text, num_bytes):
    """The whole lines within the first num_bytes."""
    data = text.encode()
    return data if len(data) <= num_bytes else data[: data.rindex(b"\n", 0, num_bytes) + 1]


def joined(rows, num_bytes):
    """The files, each cut at num_bytes, with an empty line between two."""
    return b"\n".join(first_lines(row["text"], num_bytes) for row in rows)


def text_of(rows, size):
    """The longest text of at most size bytes that cuts all files at one length."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(joined(rows, middle)) <= size else (low, middle - 1)
    print(f"{len(rows)} files, of each at most {low} bytes:", *(row["name"] for row in rows))
    return joined(rows, low)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=300_000, help="bytes of each text, at most")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    rows = sorted(read_jsonl(options.data / "heldout.jsonl"), key=name_hash)
    for part, name in enumerate(TEXTS):
        text = text_of([row for row in rows if name_hash(row) % 2 == part], options.size)
        (options.out / f"{name}.txt").write_bytes(text)
        print(f"{name}.txt: {len(text)} bytes, SHA-256 {hashlib.sha256(text).hexdigest()}\n")


if __name__ == "__main__":
    main()
