"""Penalties and logit bias of one sequence as a sparse list of (token, factor, summand), kept up to date per token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuron.protocol import SamplingParams


class TokenBias:
    """What is done to the logits of single tokens before sampling.

    For a listed token, `logit' = (logit / factor if logit > 0 else logit * factor) + summand`. The factor is the
    repetition penalty (Keskar et al. 2019, CTRL) of tokens in prompt or output. The summand is the bias minus the
    presence penalty of tokens in the output and minus the frequency penalty times their number of occurrences there
    (the OpenAI API's definition). Only listed tokens are touched, so the cost does not grow with the vocabulary.
    """

    __slots__ = ("_factors", "_frequency", "_generated", "_ids", "_index", "_presence", "_repetition", "_summands")

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        self._index: dict[int, int] = {}
        self._generated: set[int] = set()
        self._ids = array("q")
        self._factors = array("f")
        self._summands = array("f")
        for token, bias in sampling.logit_bias.items():
            self._entry(token, summand=bias)
        if self._repetition != 1.0:
            for token in prompt_ids:
                self._factors[self._entry(token)] = self._repetition
        for token in output_ids:
            self.add_output(token)

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        return (
            sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or sampling.repetition_penalty != 1.0
            or bool(sampling.logit_bias)
        )

    def _entry(self, token: int, summand: float = 0.0) -> int:
        index = self._index.get(token)
        if index is None:
            index = self._index[token] = len(self._ids)
            self._ids.append(token)
            self._factors.append(1.0)
            self._summands.append(summand)
        return index

    def add_output(self, token: int) -> None:
        """Count one generated token."""
        if self._presence == 0.0 and self._frequency == 0.0 and self._repetition == 1.0:
            return
        index = self._entry(token)
        if token not in self._generated:
            self._generated.add(token)
            self._factors[index] = self._repetition
            self._summands[index] -= self._presence
        self._summands[index] -= self._frequency

    def __len__(self) -> int:
        return len(self._ids)

    def entries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(token ids, factors, summands), each id once. Views: use them before the next `add_output`."""
        return (
            np.frombuffer(self._ids, dtype=np.int64),
            np.frombuffer(self._factors, dtype=np.float32),
            np.frombuffer(self._summands, dtype=np.float32),
        )
