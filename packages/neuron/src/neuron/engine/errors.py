"""Errors of the engine, typed by blast radius: the class decides what is lost and what recovers (law 8)."""

from __future__ import annotations

from neuron.protocol import LogitsHealth


class EngineError(Exception):
    """Base. `kind` is the machine-readable name that travels in `SequenceFailed`, `LoadFailed` or `EngineFault`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class RequestError(EngineError):
    """One request cannot be served (bad grammar, too long a prompt, NaN logits); nothing else is affected.

    health: of the logits, where they are the reason.
    """

    def __init__(self, kind: str, message: str, *, health: LogitsHealth | None = None) -> None:
        super().__init__(kind, message)
        self.health = health


class StepError(EngineError):
    """One step failed while the device is fine (out of memory, a shape error): retried smaller or one by one."""


class ShortOfMemory(StepError):
    """The smallest step of one sequence does not fit into the memory that is free now: tried again later."""


class ModelError(EngineError):
    """The model cannot be loaded or can no longer be trusted; the group must be rebuilt or given up."""


class DeviceError(EngineError):
    """The device context is lost (sticky CUDA error): only a new process heals it."""


# Texts of CUDA errors after which every further call on the context fails (CUDA runtime API, `cudaError_t`;
# the list names the ones documented as leaving the process in an inconsistent state).
_STICKY = (
    "illegal memory access",
    "device-side assert",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ecc error",
    "hardware stack error",
    "invalid program counter",
    "invalid address space",
    "device lost",
    "launch timed out",
    "nccl error",
    "unhandled cuda error",
)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def is_out_of_memory(error: BaseException) -> bool:
    """True for host and device allocation failures, wherever they sit in the exception chain."""
    for link in _chain(error):
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return True
        text = str(link).lower()
        # The CPU allocator raises a plain RuntimeError; cuBLAS and cuDNN report a failed workspace this way.
        if isinstance(link, RuntimeError) and (
            "can't allocate memory" in text or "out of memory" in text or "alloc_failed" in text
        ):
            return True
    return False


def is_device_fault(error: BaseException) -> bool:
    """True if the error, or one it was raised from, says that the device context is unusable.

    The full chain is looked at: the outer error of a failed step often names only a shape or a helper function.
    """
    for link in _chain(error):
        if isinstance(link, DeviceError) or type(link).__name__ == "AcceleratorError":
            return True
        text = str(link).lower()
        if "cuda error" in text and "out of memory" not in text:
            return True
        if any(mark in text for mark in _STICKY):
            return True
    return False


def is_capture_refusal(error: BaseException) -> bool:
    """True if CUDA refused to record something into a graph: the context is as good as before."""
    text = describe(error).lower()
    return "captur" in text and not any(mark in text for mark in _STICKY)


def describe(error: BaseException) -> str:
    """The whole chain in one line, outermost first: the inner link is usually the one that explains."""
    parts: list[str] = []
    for link in _chain(error):
        text = str(link).strip()
        parts.append(f"{type(link).__name__}: {text}" if text else type(link).__name__)
    return " <- ".join(parts)
