"""Text of packages: their sources and the documentation in their archives, without what repeats a
held-out file.

A package file that shares any run of RUN tokens with a held-out file is left out, unless the training part of the
standard library or its documentation has the same run (licence headers, idioms).
"""

import ast
import hashlib
import re
import tarfile
import zipfile
from pathlib import Path

RUN = 13
# of one package, at most this much: the largest would be most of the text
MAX_PACKAGE_BYTES = 3_000_000
MAX_FILE_BYTES = 150_000
# copies of other packages, tests, tables
SKIPPED = re.compile(
    r"(^|/)(_?vendor(ed)?|_vendored_packages|extern(al)?s?|third_?party|_distutils|tests?|testing|_tests?|idle_test|"
    r"unicode\w*|locale(s|-data)?|migrations|__pycache__|stubs?|typeshed|_build|node_modules|data|benchmarks?)/"
    r"|(^|/)(conftest|test_\w+|\w+_test|_version|versioneer|setup|six|compat|_?compat\w*)\.py$",
    re.IGNORECASE,
)
DOCUMENTATION = re.compile(r"(^|/)docs?/.*\.(rst|txt)$")
NOT_PROSE = re.compile(r"(requirements|robots|license|spelling|wordlist|change|news|history|release)", re.IGNORECASE)
TOKEN = re.compile(r"\w+|[^\s\w]")


def archive_texts(path):
    """Name and bytes of each source and documentation file of a wheel or a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py"):
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            # the first folder is the package's name and version; its sources come from the wheel
            name = member.name.partition("/")[2]
            if member.isfile() and DOCUMENTATION.search(name) and not NOT_PROSE.search(name):
                yield name, archive.extractfile(member).read()


def is_text(text, is_source):
    """Neither a table nor code of another language or version."""
    lines = text.split("\n")
    if not 400 < len(text) < MAX_FILE_BYTES or len(text) / len(lines) > 70 or max(map(len, lines)) > 400:
        return False
    other_script = len(text.encode()) > 1.02 * len(text)
    if other_script or sum(c.isdigit() for c in text) > 0.08 * len(text):
        return False
    if not is_source:
        return True
    try:
        # warnings about escapes of old sources are of no use here
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def runs(text):
    """The hash of every run of RUN tokens."""
    tokens = TOKEN.findall(text)
    return {hash(tuple(tokens[i : i + RUN])) for i in range(len(tokens) - RUN + 1)}


def forbidden_runs(train, heldout):
    """The runs of the held-out documents that no training document has."""
    forbidden = set().union(*(runs(row["text"]) for row in heldout))
    for row in train:
        forbidden -= runs(row["text"])
    return forbidden


def order_of(name):
    return hashlib.sha256(name.encode()).hexdigest()


def package_rows(path, read, seen):
    """The documents of one archive in the order of their names' hashes, until the package has enough."""
    size = 0
    for name, data in sorted(archive_texts(path), key=lambda pair: order_of(pair[0])):
        text = None if SKIPPED.search(name) else read(data)
        is_source, digest = name.endswith(".py"), hashlib.sha256(data).digest()
        if text and digest not in seen and size < MAX_PACKAGE_BYTES and is_text(text, is_source):
            seen.add(digest)
            size += len(text)
            yield {"name": f"{path.name}/{name}", "kind": "source" if is_source else "documentation", "text": text}


def canonical(name):
    return re.sub(r"[-_.]+", "_", name).lower()


def listed(path):
    """(name, version, licence, whether its documentation is taken) of each line "name==version  # licence"."""
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement, _, comment = line.partition("#")
        licence, _, more = comment.strip().partition("; ")
        yield *requirement.strip().split("=="), licence, more == "with documentation"


def archives(folder, path):
    """The wheels of the packages that path lists, and the source archives of those whose documentation is taken."""
    packages, found = list(listed(path)), {}
    wanted = [(canonical(name), version, ".whl") for name, version, _, _ in packages]
    wanted += [(canonical(name), version, ".tar.gz") for name, version, _, documented in packages if documented]
    for archive in Path(folder).iterdir():
        match = re.match(r"(.+?)-(\d[^-]*?)(?:-.*)?(\.whl|\.tar\.gz)$", archive.name)
        if match:
            found[canonical(match[1]), match[2], match[3]] = archive
    missing = [f"{name}-{version}{ending}" for name, version, ending in wanted if (name, version, ending) not in found]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {path.name} lists")
    return [found[key] for key in wanted]


def collect_packages(paths, read, train, heldout):
    """Documents of all archives, and those left out for what they share with the held-out ones."""
    forbidden, seen, kept, dropped = forbidden_runs(train, heldout), set(), [], []
    for path in paths:
        for row in package_rows(path, read, seen):
            (dropped if forbidden & runs(row["text"]) else kept).append(row)
    return kept, dropped
