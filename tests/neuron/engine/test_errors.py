"""Errors by what is lost with them: texts and chains that say so, however they are wrapped."""

from __future__ import annotations

import pytest
from neuron.engine.errors import (
    DeviceError,
    ModelError,
    RequestError,
    ShortOfMemory,
    StepError,
    describe,
    is_capture_refusal,
    is_device_fault,
    is_out_of_memory,
)


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


class AcceleratorError(RuntimeError):
    """As torch calls its own."""


def raised_from(outer: BaseException, inner: BaseException, *, explicitly: bool) -> BaseException:
    if explicitly:
        outer.__cause__ = inner
    else:
        outer.__context__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "is_memory", "is_fault"),
    [
        (MemoryError(), True, False),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True, True),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), False, True),
        (RuntimeError("NCCL error: unhandled system error"), False, True),
        (DeviceError("rank_fault", "step 5 failed"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("out of memory"), False, False),
    ],
)
def test_what_is_lost_is_read_from_type_and_text(error: BaseException, is_memory: bool, is_fault: bool) -> None:
    assert (is_out_of_memory(error), is_device_fault(error)) == (is_memory, is_fault)


@pytest.mark.parametrize("explicitly", [True, False])
def test_the_inner_link_of_a_chain_decides(explicitly: bool) -> None:
    inner = AcceleratorError("CUDA error: unspecified launch failure")
    wrapped = raised_from(StepError("step", "a step failed"), inner, explicitly=explicitly)
    assert is_device_fault(wrapped) and not is_device_fault(StepError("step", "a step failed"))
    assert is_out_of_memory(raised_from(RuntimeError("x"), MemoryError(), explicitly=explicitly))


def test_a_chain_that_leads_back_to_itself_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert describe(first) == "RuntimeError: a <- RuntimeError: b"
    assert not is_device_fault(first)


def test_a_recording_that_is_refused_leaves_the_device_well() -> None:
    refused = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    assert is_capture_refusal(refused)
    assert not is_capture_refusal(RuntimeError("CUDA error: an illegal memory access while capturing"))
    assert not is_capture_refusal(RuntimeError("shape error"))


def test_a_description_is_one_line_with_the_names_of_all() -> None:
    assert describe(raised_from(ValueError(), KeyError("x"), explicitly=True)) == "ValueError <- KeyError: 'x'"


def test_kinds_travel_and_the_smaller_loss_is_not_the_larger() -> None:
    error = ShortOfMemory("out_of_memory", "not even one token")
    assert (error.kind, error.message, str(error)) == ("out_of_memory", "not even one token", "not even one token")
    assert isinstance(error, StepError)
    assert not issubclass(RequestError, StepError) and not issubclass(ModelError, DeviceError)
