"""Penalties and logit bias of one sequence as a sparse list of (token, bias, uses), kept up to date per token."""

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
    (the OpenAI API's definition), in float32. Only listed tokens are touched, so the cost does not grow with the
    vocabulary.
    """

    __slots__ = ("_biases", "_frequency", "_ids", "_index", "_presence", "_repetition", "_uses")

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        self._index: dict[int, int] = {}
        self._ids = array("q")
        self._biases = array("f")
        self._uses = array("i")  # twice the occurrences in the output, plus one for a token of the prompt
        for token, bias in sampling.logit_bias.items():
            self._entry(token, bias)
        if self._repetition != 1.0:
            for token in prompt_ids:
                self._uses[self._entry(token)] = 1
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

    def _entry(self, token: int, bias: float = 0.0) -> int:
        index = self._index.get(token)
        if index is None:
            index = self._index[token] = len(self._ids)
            self._ids.append(token)
            self._biases.append(bias)
            self._uses.append(0)
        return index

    def add_output(self, token: int) -> None:
        """Count one generated token."""
        if self._presence == 0.0 and self._frequency == 0.0 and self._repetition == 1.0:
            return
        self._uses[self._entry(token)] += 2

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def penalties(self) -> tuple[float, float, float]:
        """(presence, frequency, repetition)."""
        return self._presence, self._frequency, self._repetition

    def counted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """(token ids, biases, uses), each id once; uses: twice the occurrences in the output, plus 1 for a token of the
        prompt that the repetition penalty concerns. Views: use them before the next `add_output`."""
        return (
            np.frombuffer(self._ids, dtype=np.int64),
            np.frombuffer(self._biases, dtype=np.float32),
            np.frombuffer(self._uses, dtype=np.int32),
        )

    def entries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(token ids, factors, summands), each id once."""
        ids, biases, uses = self.counted()
        occurrences = uses >> 1
        factors = np.where(uses > 0, np.float32(self._repetition), np.float32(1.0))
        summands = biases - np.float32(self._presence) * (occurrences > 0).astype(np.float32)
        summands -= np.float32(self._frequency) * occurrences.astype(np.float32)
        return ids, factors, summands
