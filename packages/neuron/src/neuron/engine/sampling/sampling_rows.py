"""Rows whose logits are sampled, as the host knows them at one moment.

While a step is computed its sequences go on: tokens of an earlier step are booked. So whatever the device is to use
later is collected here first: parameters, the output position of each token, penalties, the masks of grammars.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from neuron.engine.errors import EngineError, RequestError

if TYPE_CHECKING:
    from neuron.engine.scheduler.sequence import Sequence
    from neuron.engine.scheduler.token_bias import TokenBias
    from neuron.protocol import SamplingParams

# Below this temperature the best token wins by more than any noise can make up for.
_GREEDY_BELOW = 1e-5


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def is_plain_greedy(sequence: Sequence) -> bool:
    """True if the argmax of the raw logits is all that is wanted."""
    return (
        sequence.sampling.temperature < _GREEDY_BELOW
        and sequence.bias is None
        and sequence.grammar is None
        and sequence.sampling.logprobs < 0
    )


def depends_on_last_token(sequence: Sequence) -> bool:
    """True if the host must know a sequence's tokens so far before it can say how the next one is sampled."""
    return sequence.grammar is not None or sequence.bias is not None


def wants_only_a_token(sequence: Sequence) -> bool:
    """True if the sampling kernel alone does what is wanted: no masks, no penalties, no log-probabilities."""
    return sequence.bias is None and sequence.grammar is None and sequence.sampling.logprobs < 0


@dataclass(slots=True)
class SamplingRows:
    """R rows, in the order of the logits.

    is_plain: every row is `is_plain_greedy`; then nothing else is filled in. positions: of each row's token in its
    sequence's output, 0 for the first. biases: (row, penalties) of the rows that have some. mask_rows, masks: the rows
    with a grammar and their admitted tokens, [M, ceil(V / 32)] int32 bits, least significant first. errors: of rows
    whose grammar cannot go on.
    """

    num_rows: int
    is_plain: bool
    params: list[SamplingParams] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    biases: list[tuple[int, TokenBias]] = field(default_factory=list)
    mask_rows: list[int] = field(default_factory=list)
    masks: npt.NDArray[np.int32] | None = None
    errors: dict[int, EngineError] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Rows[Sequence], vocab_size: int, positions: list[int] | None = None) -> SamplingRows:
        """Of these sequences as they are now. positions: None where no token of theirs is pending."""
        if all(map(is_plain_greedy, sequences)):
            return cls(len(sequences), is_plain=True)
        if positions is None:
            positions = [sequence.num_output for sequence in sequences]
        rows = cls(len(sequences), False, [sequence.sampling for sequence in sequences], positions)
        for row, sequence in enumerate(sequences):
            if sequence.bias is not None and len(sequence.bias):
                rows.biases.append((row, sequence.bias))
            if sequence.grammar is not None:
                rows.mask_rows.append(row)
        if rows.mask_rows:
            rows.masks = np.full((len(rows.mask_rows), -(-vocab_size // 32)), -1, dtype=np.int32)
            for index, row in enumerate(rows.mask_rows):
                grammar = sequences[row].grammar
                if grammar is not None:
                    try:
                        grammar.fill_mask(rows.masks[index])
                    except RequestError as exc:
                        rows.errors[row] = exc
        return rows

    def alone(self, row: int) -> SamplingRows:
        """One of the rows."""
        return SamplingRows(
            1,
            self.is_plain,
            self.params[row : row + 1],
            self.positions[row : row + 1],
            [(0, bias) for number, bias in self.biases if number == row],
            [0] if row in self.mask_rows else [],
            None if self.masks is None or row not in self.mask_rows else self.masks[[self.mask_rows.index(row)]],
            {0: self.errors[row]} if row in self.errors else {},
        )

    @property
    def wanted(self) -> list[int]:
        """The rows whose log-probabilities are asked for."""
        return [row for row, params in enumerate(self.params) if params.logprobs >= 0]
