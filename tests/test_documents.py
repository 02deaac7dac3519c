"""Everything that documents name exists: links, headings, files, modules and make targets."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "studies" / "README.md"])
# The changelog names files that existed at the time; its links must lead to files that exist now.
DATED = {"CHANGELOG.md"}
FOLDERS = ("lockstep", "tests", "bench", "docs", "studies", "training")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
WORD = re.compile(r"[\w./-]+")
NAME_IN_FILE = re.compile(r"`([\w.]+)`\s+(?:in\s+|\()`((?:lockstep|tests|bench)/[\w/]+\.py)`")
TARGET = re.compile(r"^([\w-]+)(?: [\w-]+)*:", re.MULTILINE)


@pytest.fixture(scope="module")
def file_names():
    """Names of all files of the repository's folders."""
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}


def slugs(path):
    """The anchors that forges make of a document's headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def broken_links(path):
    """Relative links of a document that lead nowhere."""
    for link in LINK.findall(path.read_text("utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        goal = (path.parent / name) if name else path
        if not goal.exists() or (anchor and anchor not in slugs(goal)):
            yield link


def words(path):
    """All words of a document that may be paths, in sentences, links or code."""
    for word in WORD.findall(re.sub(r"https?://\S+", "", path.read_text("utf-8"))):
        yield word.strip(".-/")


def strangers(text):
    """Pairs (name, file) from `name` in `file.py` or `name` (`file.py`), if the file does not contain the name."""
    for name, place in NAME_IN_FILE.findall(text):
        path = ROOT / place
        if path.exists() and not re.search(rf"\b{name.rpartition('.')[2]}\b", path.read_text("utf-8")):
            yield name, place


def is_placeholder(word):
    """Whether a word is a placeholder for a name of the reader's choice, such as NAME_cpu.py."""
    return bool(re.search(r"[A-Z]{3}", word)) and pathlib.Path(word).stem not in ("README", "LICENSE")


def missing(path, file_names):
    """Paths, from the repository's root or from the package, that do not exist, and module names that no file has."""
    for word in words(path):
        first, _, rest = word.partition("/")
        if is_placeholder(word):
            continue
        if rest and (first in FOLDERS or (word.endswith(".py") and (ROOT / "lockstep" / first).is_dir())):
            if not (ROOT / word).exists() and not (ROOT / "lockstep" / word).exists():
                yield word
        elif word.endswith(".py") and word.rpartition("/")[2] not in file_names:
            yield word


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert list(broken_links(path)) == []


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name not in DATED], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path, file_names):
    assert list(missing(path, file_names)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_are_in_their_files(path):
    assert list(strangers(path.read_text("utf-8"))) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(path):
    text = path.read_text("utf-8")
    targets = set(TARGET.findall((ROOT / "Makefile").read_text("utf-8")))
    assert set(re.findall(r"(?:`|^ *)make (?:-\S+ )*([a-z][a-z-]+)", text, re.MULTILINE)) <= targets
    modules = set(re.findall(r"python -m ((?:tests|lockstep)[\w.]*)", text))
    places = [ROOT / module.replace(".", "/") for module in modules]
    assert [p for p in places if not p.with_suffix(".py").exists() and not (p / "__main__.py").exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_of_verify_has_one_form(path):
    """Checks that MODEL is the second word everywhere, though --model works, too."""
    assert path.name in DATED or not re.search(r"lockstep verify [^\n`]*--model", path.read_text("utf-8"))


def test_what_is_missing_is_seen(tmp_path):
    path, add = tmp_path / "text.md", "lockstep/ops/elementwise/add.py"
    path.write_text(f"# One: two\n[a](#one-two) [b](#three) [c](none.md)\n`ops/none.py` `{add}` (nothing.py)")
    assert list(strangers(f"`Add` in `{add}`, `Add.read` (`lockstep/ops/elementwise/add_cpu.py`)")) == []
    assert list(strangers(f"`Sub` in\n`{add}`")) == [("Sub", add)]
    assert list(broken_links(path)) == ["#three", "none.md"]
    assert list(missing(path, {"add.py"})) == ["ops/none.py", "nothing.py"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150
