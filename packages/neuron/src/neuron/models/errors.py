"""Why a checkpoint cannot be served, as errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from neuron.engine.errors import ModelError

_NAMES_SHOWN = 8


class UnsupportedArchitecture(ModelError):
    """No family here can run this checkpoint, or the family lacks a feature that the checkpoint uses."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_architecture", message)


class BadCheckpoint(ModelError):
    """The checkpoint is incomplete, damaged or contradicts itself. `tensors` names the ones concerned, if any."""

    def __init__(self, message: str, *, tensors: Sequence[str] = ()) -> None:
        self.tensors = tuple(tensors)
        if tensors:
            shown = ", ".join(tensors[:_NAMES_SHOWN])
            more = len(tensors) - _NAMES_SHOWN
            message = f"{message}: {shown}" + (f" and {more} more" if more > 0 else "")
        super().__init__("bad_checkpoint", message)
