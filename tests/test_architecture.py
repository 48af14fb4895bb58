"""The tree is the architecture: nothing goes in circles, no folder holds more than can be looked over, and tests are
found by the name of what they test."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "packages"
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

MAX_LINES_WITHOUT_TESTS = 100
PLACES_OF_TESTS = {
    "neuron/engine/kernels": "kernels",
    "neuron/engine/attention/attention_choice.py": "kernels/attention",
    "neuron/engine/attention/attention_plugins.py": "kernels/attention",
    "neuron/engine/attention/attention_triton.py": "kernels/attention",
}
"""Where tests of a folder or of a module are, if not at its place under `tests/`. What launches kernels is tested where
a `conftest.py` runs it in Triton's interpreter, or on the GPU where there is one."""

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


def place_of_tests(module: str) -> str:
    """Where a module's tests are, both as paths: `neuron/daemon/server.py` has `neuron/daemon/test_server.py`."""
    folder, _, name = module.rpartition("/")
    for start, place in PLACES_OF_TESTS.items():
        if module == start:
            folder = place
        elif folder == start or folder.startswith(f"{start}/"):
            folder = place + folder.removeprefix(start)
    return f"{folder}/test_{name}"


def test_the_place_of_tests_mirrors_the_packages_but_where_it_is_said() -> None:
    assert place_of_tests("cortex_core/sse.py") == "cortex_core/test_sse.py"
    assert place_of_tests("neuron/engine/kernels/gemm/gemv.py") == "kernels/gemm/test_gemv.py"
    assert place_of_tests("neuron/engine/kernels/norm.py") == "kernels/test_norm.py"
    assert place_of_tests("neuron/engine/attention/attention_triton.py") == "kernels/attention/test_attention_triton.py"
    assert place_of_tests("neuron/engine/attention/attention.py") == "neuron/engine/attention/test_attention.py"
    assert all((ROOT / "neuron/src" / start).exists() for start in PLACES_OF_TESTS), "what is said is still so"
    assert place_of_tests("neuron/engine/kernels_of_others/norm.py") == "neuron/engine/kernels_of_others/test_norm.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_of_some_length_has_a_test_module_of_its_name(package: str) -> None:
    modules = [file for file in modules_of(package).values() if file.name != "__init__.py"]
    long = [file for file in modules if len(file.read_text().splitlines()) > MAX_LINES_WITHOUT_TESTS]
    paths = [file.relative_to(PACKAGES[package].parent).as_posix() for file in long]
    places = {path: TESTS / place_of_tests(path) for path in paths}
    assert len(places) > len(modules) / 3, "those that are too short are the exception"
    assert [path for path, place in places.items() if not (place.exists() and "def test_" in place.read_text())] == []
