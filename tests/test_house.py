"""The order of the house, beside tests/test_imports.py: sorts of ops, circles of modules, names that say nothing."""

import ast

from tests.test_imports import FILES, ROOT, imported

# sorts of ops, from those that use others to those that use none; `ops` itself has what all share, and the tables
SORTS = ("sampling", "integer", "rounded", "recurrent", "attention", "linear", "elementwise")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# names that make a reader look elsewhere for what they stand for
RIDDLES = {"how"}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sort_of(module):
    """The sort that a module such as lockstep.ops.linear.tile belongs to; None for others."""
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["ops"] and parts[2:3] and parts[2] in SORTS else None


def test_sorts_of_ops_import_downward():
    sorts = {path: sort_of(module_of(path)) for path in FILES}
    assert set(SORTS) == {p.name for p in (ROOT / "lockstep" / "ops").iterdir() if (p / "__init__.py").is_file()}
    upward = [
        (str(path.relative_to(ROOT)), module)
        for path, sort in sorts.items()
        if sort
        for module in imported(path)
        if sort_of(module) and SORTS.index(sort_of(module)) < SORTS.index(sort)
    ]
    assert not upward


def circle(graph):
    """Modules that import each other in a circle, as a list; None if there are none."""
    state, trail = {}, []

    def visit(module):
        state[module] = "open"
        trail.append(module)
        for other in sorted(graph.get(module, ())):
            if state.get(other) == "open":
                return [*trail[trail.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[module] = "done"
        trail.pop()
        return None

    return next((found for module in sorted(graph) if module not in state and (found := visit(module))), None)


def loaded_with(path, modules):
    """The modules that are imported when a file is, by the statements of its top level."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lockstep"):
            yield from (m for m in (f"{node.module}.{alias.name}" for alias in node.names) if m in modules)
            yield from {node.module} & modules


def test_no_modules_import_each_other():
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): set(loaded_with(path, modules)) - {module_of(path)} for path in FILES}
    assert sum(map(len, graph.values())) > 1500 and circle(graph) is None


def test_a_circle_is_seen():
    assert circle(dict(a={"b"}, b={"c", "d"}, c=set(), d={"b"})) == ["b", "d", "b"]
    assert circle(dict(a={"b", "c"}, b={"c"})) is None


def riddles(source):
    """(line, name) of arguments and variables of a file whose names say nothing."""
    for node in ast.walk(ast.parse(source)):
        name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
        if name in RIDDLES:
            yield node.lineno, name


def test_names_say_what_they_stand_for():
    found = {str(path.relative_to(ROOT)): list(riddles(path.read_text("utf-8"))) for path in (*FILES, *TESTS)}
    assert not {path: names for path, names in found.items() if names}


def test_a_riddle_is_seen():
    assert list(riddles("def f(x, how):\n    a, how = x")) == [(1, "how"), (2, "how")]
