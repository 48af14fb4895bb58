"""Why a checkpoint cannot be served, as errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from neuron.checkpoint.errors import with_names
from neuron.engine.errors import ModelError


class UnsupportedArchitecture(ModelError):
    """No family here can run this checkpoint, or the family lacks a feature that the checkpoint uses."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_architecture", message)


class BadCheckpoint(ModelError):
    """The checkpoint is incomplete, damaged or contradicts itself. `tensors` names the ones concerned, if any.

    is_named: the message has their names already.
    """

    def __init__(self, message: str, *, tensors: Sequence[str] = (), is_named: bool = False) -> None:
        self.tensors = tuple(tensors)
        super().__init__("bad_checkpoint", message if is_named else with_names(message, self.tensors))
