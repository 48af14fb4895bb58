"""Limits of every step of one engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimits:
    """max_step_tokens: budget of a step; max_running: sequences that hold pages at a time; max_model_len: positions."""

    max_step_tokens: int
    max_running: int
    max_model_len: int
