"""Imports only go down: folders in the order in which a token passes them.

`weights` is below `ops`: an implementation of an op names the layout in which it reads its weights.
"""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ORDER = (
    "__main__",
    "cli",
    "commands",
    "bench",
    "bench_serve",
    "describe",
    "ceiling",
    "parity",
    "serve",
    "engine",
    "models",
    "ptq",
    "ops",
    "weights",
    "runtime",
)


def part(module):
    """Which of ORDER a module such as lockstep.ops.add belongs to; None for the bare package, which imports nothing."""
    names = module.split(".")
    return names[1] if len(names) > 1 else None


def imported(path):
    """Full names of what a file imports from lockstep, whether on top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            if node.module == "lockstep":
                yield from (f"lockstep.{alias.name}" for alias in node.names if alias.name != "__version__")
            elif node.module.startswith("lockstep."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lockstep."))


def upward(path):
    """Imports of a file that go up: (its part, the imported module)."""
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return [
        (own, module)
        for module in imported(path)
        if own != "__init__" and part(module) and ORDER.index(part(module)) < ORDER.index(own)
    ]


FILES = sorted((ROOT / "lockstep").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert not upward(path)


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


# what a second backend would use as it is: none of it may load a compiler or know addresses
PURE = ("runtime.words", "runtime.step_block", "runtime.program", "runtime.operands")


def test_programs_and_declarations_need_no_compiler():
    code = f"import sys, {', '.join(f'lockstep.{name}' for name in PURE)}; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


MOST_POSITIONAL = 8


def test_no_call_is_a_long_list_of_positions():
    """Arguments that belong together are a NamedTuple, options have names."""
    defined = [(path.name, node) for path in FILES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    functions = [(name, node) for name, node in defined if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    counts = {(name, f.name): len(f.args.posonlyargs) + len(f.args.args) for name, f in functions}
    assert not {place: count for place, count in counts.items() if count > MOST_POSITIONAL}
