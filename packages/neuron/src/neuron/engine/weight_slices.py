"""The contract between layers and the weight loader: where a checkpoint tensor goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """One checkpoint tensor, seen from the layer that holds (a part of) it.

    suffix: last component of the checkpoint's name (`weight`, `bias`). checkpoint_shape: its full shape, which the
    loader verifies before it reads. source: what this rank reads of it, one slice per dimension. parameter: the
    layer's parameter; target: where in it the part is written. Source and target have the same extent. stored: the
    dtype that the file must have it in, as safetensors names it, and that it keeps; None is any float, which becomes
    the parameter's.
    """

    suffix: str
    checkpoint_shape: tuple[int, ...]
    source: Slices
    parameter: str
    target: Slices
    stored: str | None = None


@runtime_checkable
class Loadable(Protocol):
    """A layer with parameters."""

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        """The checkpoint tensors of one checkpoint module. `part` names the slice of a fused layer, else None."""
        ...


@runtime_checkable
class NeedsFinishing(Protocol):
    """A layer that derives something from its loaded parameters."""

    def finish_loading(self) -> None:
        """Called once, after every parameter of the model has been filled."""
        ...
