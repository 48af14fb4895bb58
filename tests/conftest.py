"""Selections of the suite: everything, the shorter form that CI has time for, and the quick one (`-m unit`)."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

# Before torch is imported. Threads that spin while they wait take the processor from the daemons and engines that a
# test waits for, and of two test processes each has one core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Some images forbid bytecode. Each of the many processes that tests start would then compile what it imports: an engine
# takes 5.4 s to start instead of 2.6, for torch.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"

pytest.register_assert_rewrite(
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(TESTS.rglob("harness.py")))
)

# Folders whose tests are about processes, or take their time by design.
NOT_QUICK = {"bench", "chaos", "e2e", "fuzz", "hostile", "kernels", "parity"}
STARTS_PROCESSES = re.compile(
    r"\b(subprocess|multiprocessing|Popen|fork|TextPool|await ServedText\.open|EngineGroup|ProcessGroup|run_neuron"
    r"|BodyWorkers|BodyProcess)\b"
)
IMPORT_OF_TESTS = re.compile(r"^from (tests(?:\.\w+)*) import (.*)$", re.M)
SLOW = TESTS / "slow_tests.txt"
"""Tests that took more than a second of processor time, one a line, without parameters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick, and leave out what is marked `full`, unless `CORTEX_FULL=1` asks for everything."""
    slow = set(SLOW.read_text().split())
    skip = pytest.mark.skip(reason="a variant of a test that runs; CORTEX_FULL=1 uv run pytest runs it too")
    for item in items:
        if item.get_closest_marker("full") is not None and os.environ.get("CORTEX_FULL") != "1":
            item.add_marker(skip)
        name = f"{item.path.relative_to(ROOT)}::{item.nodeid.split('::', 1)[-1].partition('[')[0]}"
        if is_quick(item.path) and name not in slow and not any(item.iter_markers("slow")):
            item.add_marker(pytest.mark.unit)
    # What starts processes comes first: of two test processes neither is left alone with it at the end.
    items.sort(key=lambda item: is_quick(item.path))


@cache
def is_quick(path: Path) -> bool:
    """False for a test module that starts processes: by itself, by what it imports of tests, or by fixtures."""
    folders = path.relative_to(TESTS).parts[:-1]
    if NOT_QUICK & set(folders):
        return False
    conftests = [TESTS.joinpath(*folders[:depth], "conftest.py") for depth in range(1, len(folders) + 1)]
    return not any(starts_processes(each) for each in (path, *conftests) if each.exists())


@cache
def starts_processes(path: Path) -> bool:
    text = path.read_text()
    if STARTS_PROCESSES.search(text):
        return True
    imported = [ROOT.joinpath(*module.split(".")).with_suffix(".py") for module, _ in IMPORT_OF_TESTS.findall(text)]
    return any(starts_processes(each) for each in imported if each.exists() and each != path)
