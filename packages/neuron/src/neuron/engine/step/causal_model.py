"""Interface between the runner of steps and a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from neuron.engine.attention.interface import StepContext


class CausalModel(Protocol):
    """What the runner needs of a model; `neuron.engine.models` implements it."""

    def forward(self, ctx: StepContext) -> Tensor:
        """Hidden states [T, H] of the step's tokens; writes their keys and values into the cache."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V] float32."""
        ...
