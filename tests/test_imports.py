"""Imports only go down: rooms (folders and files of the package) in the order in which a token passes them.

`formats` and `weights` are below `ops`: an implementation of an op names the layout in which it reads its weights.
"""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ORDER = (
    "__main__",
    "cli",
    "commands",
    "lab",
    "study",
    "serve",
    "batch",
    "replicas",
    "llm",
    "constrained",
    "loading",
    "completion",
    "receipts",
    "engine",
    "text",
    "models",
    "ptq",
    "ops",
    "weights",
    "formats",
    "runtime",
    "native",
    "interrupts",
    "progress",
    "user_cache",
    "new_files",
    "other_names",
)
COMPILERS = ("numba", "llvmlite")  # only the room `native` knows them


def part(module):
    """The room in ORDER that a module such as lockstep.ops.elementwise.add belongs to; None for the bare package."""
    names = module.split(".")
    return names[1] if len(names) > 1 else None


def imported(path):
    """Full names of the modules of lockstep that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            if node.module == "lockstep":
                yield from (f"lockstep.{alias.name}" for alias in node.names if alias.name != "__version__")
            elif node.module.startswith("lockstep."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lockstep."))


def compilers(source):
    """Those of COMPILERS that a source text imports."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} & set(COMPILERS)


def room(path):
    """The room of a file of the package."""
    return part(".".join(path.relative_to(ROOT).with_suffix("").parts))


def upward(path):
    """Imports of a file that go up: (its room, the imported module)."""
    own = room(path)
    return [
        (own, module)
        for module in imported(path)
        if own != "__init__" and part(module) and ORDER.index(part(module)) < ORDER.index(own)
    ]


BENCHES = sorted((ROOT / "bench").glob("*.py"))
FILES = sorted((ROOT / "lockstep").rglob("*.py"))
SHOWN = ("lockstep", "tests", "bench", "docs", "studies", "training")
SHOWN_FILES = [path for name in SHOWN for path in (ROOT / name).rglob("*.*") if "__pycache__" not in path.parts]
FOLDERS = sorted({path.parent for path in SHOWN_FILES if path.is_file()})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert not upward(path)


def test_the_design_lists_the_rooms_and_what_each_may_import():
    table = (ROOT / "docs" / "design.md").read_text("utf-8").split("## The rooms")[1].split("##")[0]
    rows = [row.split("|")[1::2] for row in table.splitlines() if row.startswith("| `")]
    names = [[re.findall(r"`(\w+)`", cell) for cell in cells] for cells in rows]
    assert [name for rooms, _ in names for name in rooms] == list(ORDER)
    allowed = {name: {*rooms, *below} for rooms, below in names for name in rooms}
    files = [path for path in FILES if room(path) != "__init__"]
    taken = {(room(path), part(module)) for path in files for module in imported(path) if part(module)}
    assert [pair for pair in sorted(taken) if pair[1] not in allowed[pair[0]]] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_native_knows_the_compilers(path):
    assert "native" in path.parts or not compilers(path.read_text("utf-8"))


def test_an_imported_compiler_is_seen():
    assert compilers("def f():\n    from numba.core import types\n    import numpy, llvmlite.ir") == {
        "numba",
        "llvmlite",
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_folder_has_more_than_twenty_files(folder):
    assert sum(path.is_file() for path in folder.iterdir()) <= 20


def test_no_file_has_more_than_400_lines():
    paths = [path for folder in FOLDERS for name in ("*.py", "*.md") for path in folder.glob(name)]
    assert len(paths) > 700 and not [p for p in paths if len(p.read_text("utf-8").splitlines()) > 400]


def test_the_package_itself_imports_nothing():
    code = "import sys, lockstep; print(*(name for name in sys.modules if name.split('.')[0] in ('lockstep', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lockstep"]


def test_types_are_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lockstep"]
    assert "py.typed" in shipped and (ROOT / "lockstep" / "py.typed").is_file()


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "lockstep" / "ops" / "add.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from lockstep import serve\n    from lockstep.engine.model import Model\n"
        "    import lockstep.runtime.step\n"
    )
    assert upward(path) == [("ops", "lockstep.serve"), ("ops", "lockstep.engine.model")]


# modules that a second backend would use unchanged: none of them may load a compiler or know addresses
PURE = ("runtime.words", "runtime.step_block", "runtime.program", "runtime.operands")


def test_programs_and_declarations_need_no_compiler():
    code = f"import sys, {', '.join(f'lockstep.{name}' for name in PURE)}; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


MOST_POSITIONAL = 8


def positional(source):
    """{(name, line, column): how many arguments it takes by position} of every function and call of a file."""
    nodes = list(ast.walk(ast.parse(source)))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    taken = {(f.name, f.lineno, f.col_offset): len(f.args.posonlyargs) + len(f.args.args) for f in functions}
    return taken | {
        (ast.unparse(n.func), n.lineno, n.col_offset): len(n.args) for n in nodes if isinstance(n, ast.Call)
    }


@pytest.mark.parametrize("path", [*FILES, *BENCHES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_call_is_a_long_list_of_positions(path):
    """Arguments that belong together are a NamedTuple, options have names."""
    counts = positional(path.read_text("utf-8"))
    assert not {place: count for place, count in counts.items() if count > MOST_POSITIONAL}


def test_every_function_of_a_name_is_counted():
    source = "class A:\n  def f(self, a, /): pass\nclass B:\n  async def f(self, *, b): pass\ndef f(): f(1, c=2) or f()"
    assert positional(source) == {("f", 2, 2): 2, ("f", 4, 2): 1, ("f", 5, 0): 0, ("f", 5, 9): 1, ("f", 5, 22): 0}
