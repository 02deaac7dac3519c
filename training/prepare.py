"""Collect the training text: the standard library's sources and documentation, packages, and pairs made from
documented functions.

Writes train.jsonl, heldout.jsonl (whole files) and train_pairs.jsonl, heldout_pairs.jsonl (request, answer) into --out,
and packages.jsonl, documents.jsonl with --packages.
A file is held out when the hash of its name says so, and its functions with it.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from pathlib import Path

from package_texts import archives, collect_packages

# Tests, tables of numbers and bundled third-party code: nothing to learn prose or Python from.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "_bundled", "__pycache__", "msilib"}
# topics.py repeats the documentation.
SKIPPED_FILES = {"pydoc_data/topics.py"}
DOC_FOLDERS = ("library", "reference", "tutorial", "howto", "faq", "using", "whatsnew")
HELD_OUT_PER_MILLE = 40
# what is taken of packages
PACKAGE_FILES = {"packages": "source", "documents": "documentation"}
MAX_ANSWER_BYTES = 2000


def is_held_out(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def read_text(path):
    return clean(path.read_bytes())


def clean(data):
    """A file's text with a final newline and no tabs, or None where it is not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").expandtabs(8).strip("\n") + "\n"


def collect_sources(lib):
    for path in sorted(lib.rglob("*.py")):
        name = path.relative_to(lib).as_posix()
        skipped = SKIPPED_FOLDERS.intersection(path.relative_to(lib).parts) or name in SKIPPED_FILES
        # build-time settings of one machine
        if not skipped and not name.startswith("_sysconfigdata"):
            yield "Lib/" + name, "source", read_text(path)


def collect_docs(docs):
    for folder in DOC_FOLDERS:
        paths = sorted((docs / folder).rglob("*.rst.txt"))
        if not paths:
            raise ValueError(f"{docs / folder} has no *.rst.txt files: --docs is the documentation's html/_sources")
        for path in paths:
            name = path.relative_to(docs).as_posix()
            if name != "whatsnew/changelog.rst.txt":
                yield "Doc/" + name, "documentation", read_text(path)


def answer_of(function, lines):
    """The function's source, dedented, its docstring cut to the first line."""
    doc = function.body[0]
    indent = " " * function.col_offset
    first = min([function.lineno] + [d.lineno for d in function.decorator_list])
    head, tail = lines[first - 1 : doc.lineno - 1], lines[doc.end_lineno : function.end_lineno]
    summary = ast.get_docstring(function).split("\n")[0].strip()
    body = " " * doc.col_offset + '"""' + summary + '"""'
    text = "\n".join(line.removeprefix(indent).rstrip() for line in [*head, body, *tail])
    return summary, text


def is_usable(function, lines):
    """A function with a docstring on its own lines, something after it, and quotes that survive the cut."""
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(function.body) < 2:
        return False
    summary = (ast.get_docstring(function) or "").split("\n")[0].strip()
    doc = function.body[0]
    on_own_lines = lines[doc.lineno - 1].lstrip()[:1] in "\"'rR" and doc.lineno > function.lineno
    return on_own_lines and 12 <= len(summary) <= 120 and '"' not in summary and "\\" not in summary


def collect_pairs(name, text):
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")
    for function in ast.walk(tree):
        if is_usable(function, lines):
            request, answer = answer_of(function, lines)
            if len(answer.encode()) <= MAX_ANSWER_BYTES and parses(answer):
                yield {"name": name, "request": request, "answer": answer}


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def write_jsonl(path, rows):
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    size = sum(len(row.get("text", row.get("answer", "")).encode()) for row in rows)
    print(f"{path.name}: {len(rows)} rows, {size / 1e6:.2f} MB")


def read_jsonl(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_packages(folder, out):
    """packages.jsonl: sources from the wheels of packages.txt; documents.jsonl: documentation from source archives."""
    paths = archives(folder, Path(__file__).with_name("packages.txt"))
    kept, dropped = collect_packages(paths, clean, read_jsonl(out / "train.jsonl"), read_jsonl(out / "heldout.jsonl"))
    for name, kind in PACKAGE_FILES.items():
        write_jsonl(out / f"{name}.jsonl", [row for row in kept if row["kind"] == kind])
    size = sum(len(row["text"]) for row in dropped) / 1e6
    print(f"left out for passages of held-out files: {len(dropped)} files, {size:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--docs", type=Path, required=True, help="folder of the documentation's .rst.txt files (html/_sources)"
    )
    parser.add_argument("--lib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--packages", type=Path, help="folder of the packages' archives; without it, none")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    documents = [*collect_sources(options.lib), *collect_docs(options.docs)]
    rows = [{"name": n, "kind": k, "text": t} for n, k, t in documents if t and len(t) > 200]
    for part, held_out in (("train", False), ("heldout", True)):
        chosen = [row for row in rows if is_held_out(row["name"]) == held_out]
        write_jsonl(options.out / f"{part}.jsonl", chosen)
        sources = [row for row in chosen if row["kind"] == "source"]
        write_jsonl(
            options.out / f"{part}_pairs.jsonl", [p for row in sources for p in collect_pairs(row["name"], row["text"])]
        )
    if options.packages:
        write_packages(options.packages, options.out)


if __name__ == "__main__":
    main()
