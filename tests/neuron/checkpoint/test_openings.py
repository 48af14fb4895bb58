"""A checkpoint's files are opened in one place: every other opening in the neuron is listed here, with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import neuron

ROOT = Path(neuron.__file__).parent

OPENERS = {
    "open",
    "read_text",
    "read_bytes",
    "fdopen",
    "mmap",
    "memmap",
    "fromfile",
    "from_file",
    "safe_open",
    "load_file",
}

KNOWN = {
    # of a checkpoint: the one place, and what reads from the descriptors it gives
    ("checkpoint/files.py", "open_file"): "the place",
    ("checkpoint/weight_files.py", "headers_of"): "calls the place",
    ("engine/weights/safetensors_reader.py", "_headers"): "calls the place",
    ("engine/weights/pipeline.py", "_copy_runs"): "maps what the reader has opened, in the engine",
    ("daemon/memory/weight_cache.py", "_copy_file"): "a descriptor of the place",
    # the cache of downloads, as it is written
    ("daemon/hub/download.py", "_fetch_once"): "the growing part, in the cache's own folder",
    ("daemon/hub/download.py", "_try_lock"): "locks of the cache",
    # not of a checkpoint
    ("daemon/lifecycle/state_file.py", "open"): "the neuron's own state",
    ("daemon/lifecycle/state_file.py", "write_state"): "the neuron's own state",
    ("daemon/text_workers/limits.py", "_data_bytes"): "/proc",
    ("daemon/text_workers/host.py", "_fork"): "shared memory without a file",
    ("daemon/hardware/host.py", "*"): "/proc and /sys",
    ("daemon/hardware/nvml.py", "*"): "/proc and the driver",
    ("host_memory.py", "*"): "/proc and /sys",
    ("engine/weights/materialise.py", "*"): "/sys",
    ("daemon/server.py", "*"): "locks of the runtime folder",
}


def openings() -> Iterator[tuple[str, str, int]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        yield from ((name, function, line) for function, line in _in_module(ast.parse(path.read_text())))


def _in_module(tree: ast.Module) -> Iterator[tuple[str, int]]:
    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call) and _opens(child.func):
                yield function, child.lineno
            yield from walk(child, inner)

    yield from walk(tree, "")


def _opens(called: ast.expr) -> bool:
    if isinstance(called, ast.Name):
        return called.id in OPENERS - {"read_text"}  # by that name, the bounded one is imported
    return isinstance(called, ast.Attribute) and called.attr in OPENERS and not _is_ours(called)


def _is_ours(called: ast.Attribute) -> bool:
    """`self.admission.open()` and the like: an object of ours, and no path."""
    text = ast.unparse(called)
    return called.attr == "open" and (
        text in ("ServedText.open", "pool.open", "model.admission.open", "self._tools.open", "self._served.open")
        or text == "nvml.open"
    )


def test_H8_nothing_else_opens_a_checkpoints_files() -> None:
    unknown = [
        (file, function, line)
        for file, function, line in openings()
        if (file, function) not in KNOWN and (file, "*") not in KNOWN
    ]
    assert not unknown, f"open these through neuron.checkpoint.files: {unknown}"


def test_every_entry_of_the_list_is_still_there() -> None:
    found = {(file, function) for file, function, _ in openings()}
    called = {("checkpoint/weight_files.py", "headers_of"), ("engine/weights/safetensors_reader.py", "_headers")}
    files = {file for file, _ in found}
    gone = [entry for entry in KNOWN if entry not in found | called and not (entry[1] == "*" and entry[0] in files)]
    assert not gone
