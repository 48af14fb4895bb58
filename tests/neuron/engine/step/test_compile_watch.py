"""A kernel that is compiled while requests wait is a defect, and is named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from neuron.engine.step.compile_watch import CompileWatch

triton = pytest.importorskip("triton", reason="what is watched are Triton's compilations; triton is not installed")


@pytest.fixture
def earlier() -> Iterator[list[str]]:
    """A hook that somebody set before, and what it saw."""
    seen: list[str] = []

    def hook(*arguments: object, **details: object) -> bool:
        seen.append(str(details["repr"]))
        return True

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = hook
    yield seen
    triton.knobs.runtime.jit_post_compile_hook = before


def compiled(name: str) -> object:
    """What Triton calls after it compiled the kernel of that name."""
    hook = triton.knobs.runtime.jit_post_compile_hook
    return hook(key="k", repr=f"{name}(i32)", fn=SimpleNamespace(name=name), compile=None, already_compiled=False)


def test_late_compilations_are_counted_and_named(earlier: list[str], caplog: pytest.LogCaptureFixture) -> None:
    watch = CompileWatch()
    watch.arm()
    with caplog.at_level(logging.WARNING):
        assert compiled("paged_decode") is True, "the earlier hook still decides"
    assert watch.num_late == 1
    assert "paged_decode" in caplog.text
    assert earlier == ["paged_decode(i32)"]


def test_those_that_are_expected_are_not(earlier: list[str]) -> None:
    watch = CompileWatch()
    with watch.expected():
        pass
    watch.arm()
    with pytest.raises(RuntimeError, match="refused"), watch.expected():
        compiled("recorded")
        raise RuntimeError("refused")
    assert watch.num_late == 0
    compiled("late")
    assert watch.num_late == 1


def test_one_that_is_not_armed_yet_counts_nothing_and_arming_twice_counts_once(earlier: list[str]) -> None:
    watch = CompileWatch()
    watch.saw("early")
    assert watch.num_late == 0
    watch.arm()
    watch.arm()
    compiled("late")
    assert watch.num_late == 1
    assert earlier == ["late(i32)"]
