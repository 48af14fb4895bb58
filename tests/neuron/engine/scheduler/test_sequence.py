"""One sequence: what a sampled token does to it, and when it ends."""

from __future__ import annotations

from typing import Any

import pytest
from neuron.engine.scheduler.sequence import Sequence
from neuron.protocol import Generate, SamplingParams

PROMPT = (1, 2, 3)


def sequence(**fields: Any) -> Sequence:
    settings: dict[str, Any] = {"max_tokens": 10, **fields}
    return Sequence(Generate(1, list(PROMPT), SamplingParams(), **settings), arrival=0)


class Grammar:
    """Complete after so many tokens."""

    def __init__(self, length: int) -> None:
        self.left = length

    def advance(self, token: int) -> bool:
        self.left -= 1
        return self.left == 0


def test_a_resumed_sequence_counts_what_it_had() -> None:
    resumed = sequence(output_ids=(4, 5), max_tokens=3)
    assert (resumed.num_tokens, resumed.num_prompt, resumed.num_output) == (5, 3, 2)
    assert resumed.append(6, max_model_len=100) == (True, "length")


def test_a_stop_token_is_no_output() -> None:
    one = sequence(stop_token_ids=(9,))
    assert one.append(8, max_model_len=100) == (True, None)
    assert one.append(9, max_model_len=100) == (False, "stop")
    assert one.tokens == [*PROMPT, 8]


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 100), (10, 5)])
def test_it_ends_at_its_own_limit_or_at_the_models(max_tokens: int, max_model_len: int) -> None:
    one = sequence(max_tokens=max_tokens)
    assert one.append(4, max_model_len=max_model_len) == (True, None)
    assert one.append(5, max_model_len=max_model_len) == (True, "length")


def test_a_complete_grammar_ends_it_before_its_limit() -> None:
    one = sequence(max_tokens=2)
    one.grammar = Grammar(2)  # type: ignore[assignment]
    assert one.append(4, max_model_len=100) == (True, None)
    assert one.append(5, max_model_len=100) == (True, "grammar")


def test_pending_tokens_count_towards_the_limits() -> None:
    one = sequence(max_tokens=2)
    one.num_pending = 1
    assert one.num_unscheduled == 4 and not one.ends_with_pending(100) and one.ends_with_pending(4)
    one.append(4, max_model_len=100)
    assert one.ends_with_pending(100)
