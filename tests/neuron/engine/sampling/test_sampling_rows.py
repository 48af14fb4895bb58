"""Rows whose logits are sampled, as the host knows them at one moment."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from neuron.engine.errors import RequestError
from neuron.engine.sampling.sampling_rows import (
    SamplingRows,
    depends_on_last_token,
    is_greedy,
    is_plain_greedy,
    wants_only_a_token,
)
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, SamplingParams

VOCAB = 70
GREEDY = SamplingParams(temperature=0.0)


class Grammar:
    """Admits one token, or cannot go on."""

    def __init__(self, token: int | None) -> None:
        self.token = token

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        if self.token is None:
            raise RequestError("grammar", "cannot go on")
        mask[:] = 0
        mask[self.token // 32] = 1 << (self.token % 32)


def sequence(sampling: SamplingParams = GREEDY, *, grammar: Grammar | None = None, num_output: int = 0) -> Sequence:
    made = Sequence(
        Generate(request_id=1, prompt_ids=[1, 2], output_ids=(5,) * num_output, sampling=sampling, max_tokens=99), 1
    )
    made.grammar = grammar  # type: ignore[assignment]
    if TokenBias.is_needed(sampling):
        made.bias = TokenBias(sampling, [1, 2], [5] * num_output)
    return made


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-6, True), (1e-5, False), (1.0, False)])
def test_a_temperature_that_no_noise_can_make_up_for_is_greedy(temperature: float, greedy: bool) -> None:
    assert is_greedy(SamplingParams(temperature=temperature)) is greedy
    assert is_plain_greedy(sequence(SamplingParams(temperature=temperature))) is greedy


@pytest.mark.parametrize(
    ("params", "grammar", "is_plain", "only_a_token", "depends"),
    [
        ({}, None, True, True, False),
        ({"temperature": 1.0}, None, False, True, False),
        ({"logprobs": 0}, None, False, False, False),
        ({"presence_penalty": 1.0}, None, False, False, True),
        ({}, Grammar(3), False, False, True),
    ],
)
def test_what_a_row_wants_beside_the_best_token(
    params: dict[str, float], grammar: Grammar | None, is_plain: bool, only_a_token: bool, depends: bool
) -> None:
    made = sequence(SamplingParams(**{"temperature": 0.0, **params}), grammar=grammar)  # type: ignore[arg-type]
    assert (is_plain_greedy(made), wants_only_a_token(made), depends_on_last_token(made)) == (
        is_plain,
        only_a_token,
        depends,
    )


def test_rows_that_want_nothing_more_are_not_looked_at() -> None:
    rows = SamplingRows.of([sequence(), sequence()], VOCAB)
    assert rows.is_plain and rows.num_rows == 2 and not rows.params and rows.wanted == []


def test_one_row_that_wants_more_has_all_of_them_filled_in() -> None:
    rows = SamplingRows.of(
        [sequence(num_output=4), sequence(SamplingParams(temperature=1.0, logprobs=2)), sequence(grammar=Grammar(40))],
        VOCAB,
    )
    assert not rows.is_plain and rows.positions == [4, 0, 0] and rows.wanted == [1]
    assert rows.mask_rows == [2] and rows.masks is not None and rows.masks.shape == (1, 3)
    assert rows.masks.tolist() == [[0, 1 << 8, 0]]
    assert SamplingRows.of([sequence(SamplingParams(temperature=1.0))], VOCAB, [7]).positions == [7]


def test_a_grammar_that_cannot_go_on_is_an_error_of_its_row_alone() -> None:
    rows = SamplingRows.of([sequence(grammar=Grammar(None)), sequence(grammar=Grammar(1))], VOCAB)
    assert list(rows.errors) == [0] and rows.masks is not None
    assert rows.masks[0].tolist() == [-1, -1, -1], "a row that fails masks nothing"


def test_a_row_alone_is_what_it_is_among_others() -> None:
    rows = SamplingRows.of(
        [
            sequence(SamplingParams(temperature=1.0, presence_penalty=1.0), num_output=3),
            sequence(grammar=Grammar(None)),
            sequence(grammar=Grammar(2), num_output=1),
        ],
        VOCAB,
    )
    first, broken, last = (rows.alone(row) for row in range(3))
    assert (first.positions, [row for row, _ in first.biases], first.masks, first.errors) == ([3], [0], None, {})
    assert list(broken.errors) == [0] and broken.mask_rows == [0]
    assert last.masks is not None and last.masks.tolist() == [[4, 0, 0]] and last.mask_rows == [0] and not last.errors
