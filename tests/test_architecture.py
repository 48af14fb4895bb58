"""The tree is the architecture: nothing goes in circles, and no folder holds more than can be looked over."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "packages"
PACKAGES = {
    "cortex_core": ROOT / "cortex-core/src/cortex_core",
    "cortex_gateway": ROOT / "cortex-gateway/src/cortex_gateway",
    "neuron": ROOT / "neuron/src/neuron",
    "cortex_cli": ROOT / "cortex-cli/src/cortex_cli",
}
SHIMS = {"neuron.cli", "neuron.worker"}
"""Old names of ways in, which nobody imports either."""
MAX_MODULES = 15
MAX_PARAMETERS = 8
"""Of a constructor, itself not counted."""

Graph = dict[str, set[str]]


def modules_of(package: str) -> dict[str, Path]:
    """By their dotted names. `__main__` is a way in, which nobody imports."""
    root = PACKAGES[package]
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in found.items() if name not in SHIMS}


def imports_of(source: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The package's own modules that a module names in its imports, wherever they stand: in functions and for type
    checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module


def module_graph(package: str) -> Graph:
    modules = modules_of(package)
    return {name: set(imports_of(file.read_text(), modules)) - {name} for name, file in modules.items()}


def folder_graph(package: str) -> Graph:
    """The package's root counts as a folder."""
    modules = modules_of(package)

    def folder(name: str) -> str:
        return name if modules[name].name == "__init__.py" else name.rpartition(".")[0]

    graph: Graph = {}
    for name, targets in module_graph(package).items():
        graph.setdefault(folder(name), set()).update({folder(target) for target in targets} - {folder(name)})
    return graph


def circles_in(graph: Graph) -> list[set[str]]:
    """Sets of nodes that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            circle = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(circle) > 1:
                circles.append(circle)

    for node in graph:
        if node not in index:
            visit(node)
    return circles


def test_a_circle_is_found_and_a_tree_is_none() -> None:
    assert circles_in({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}]
    assert circles_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_for_type_checkers_and_inside_functions_count() -> None:
    source = "if TYPE_CHECKING:\n    from p.a import X\ndef f():\n    from p import b\n    import p.c\n"
    modules = dict.fromkeys(("p", "p.a", "p.b", "p.c"), Path())
    assert set(imports_of(source, modules)) == {"p.a", "p.b", "p.c"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_go_in_a_circle(package: str) -> None:
    assert circles_in(module_graph(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folders_go_in_a_circle(package: str) -> None:
    assert circles_in(folder_graph(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_more_than_can_be_looked_over(package: str) -> None:
    counts = Counter(file.parent for file in modules_of(package).values() if file.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_the_drawn_tree_of_the_neuron_is_the_tree() -> None:
    page = (ROOT.parent / "docs/explanation/architecture.md").read_text()
    drawn = page.split("```\nneuron/\n")[1].split("```")[0]
    path: list[str] = []
    folders = set()
    for line in drawn.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[: depth - 1], name.rstrip("/")]
        if name.endswith("/"):
            folders.add("/".join(path))
    root = PACKAGES["neuron"]
    real = {str(file.parent.relative_to(root)) for file in modules_of("neuron").values()} - {"."}
    assert folders == real


def test_nobody_imports_a_shim() -> None:
    files = [file for root in PACKAGES.values() for file in root.rglob("*.py")]
    trees = {file: ast.parse(file.read_text()) for file in files}
    assert [
        file
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in SHIMS
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_constructor_has_more_parameters_than_can_be_kept_in_mind(package: str) -> None:
    found = {}
    for name, file in modules_of(package).items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = node.args
                number = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
                if number > MAX_PARAMETERS:
                    found[f"{name}:{node.lineno}"] = number
    assert not found
