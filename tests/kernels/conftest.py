"""Kernel tests run compiled on a CUDA device where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.kernels import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if find_spec("triton") is None:  # torch's CPU-only wheels come without it
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]
elif DEVICE.type == "cpu":
    interpreter.enable()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreter mode while a test of this folder runs, so that no engine started by another test inherits it."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def place_free_dot() -> Iterator[None]:
    """On the CPU, a `tl.dot` whose bits do not depend on an element's place, as on a GPU."""
    if DEVICE.type != "cpu":
        yield
        return
    with interpreter.ordered_dot():
        yield
