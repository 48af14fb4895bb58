"""Tests of what the native CPU kernels compute: they run where those were built, which takes a C++ compiler."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

REASON = "the native CPU kernels are not built here: no C++ compiler was found (CONTRIBUTING.md)"
needs_native_kernels = pytest.mark.skipif(find_spec("_neuron_cpu") is None, reason=REASON)
NATIVE = pytest.param(True, marks=needs_native_kernels)
"""The parameter `native` of a test that takes both ways."""


def import_or_skip() -> None:
    """At the head of a test module that imports them."""
    pytest.importorskip("_neuron_cpu", reason=REASON)
