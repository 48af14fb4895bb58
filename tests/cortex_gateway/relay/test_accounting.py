"""What a request is charged with when it ends, whatever ended it."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.hop import TOKENS_MARK, ChoiceTokens, tokens_comment
from cortex_gateway.identity import estimate
from cortex_gateway.relay.accounting import generated_tokens, used
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.answer_stream import Usage

from tests.cortex_gateway.relay.harness import OPENAI_SURFACES, request_state

EXPECTED = estimate.estimate(b'{"model": "m", "max_tokens": 100, "messages": []}', None)
TOLD = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2)


class Grant:
    """What the charge asks of a grant."""

    estimate = EXPECTED


class Written:
    """A stream of which so much was sent on."""

    def __init__(self, num_events: int = 0, *batches: list[ChoiceTokens]) -> None:
        self.num_events = num_events
        texts = (tokens_comment(batch).removeprefix(TOKENS_MARK).rstrip() for batch in batches)
        self.batches = b"".join(text + b"," for text in texts)


def asked(*, sent_at: float | None = 1.0, surface: Surface | None = None, **fields: Any) -> RequestState:
    request = request_state(surface=surface or OPENAI_SURFACES[0])
    grant: Any = Grant()
    request.grant, request.sent_at = grant, sent_at
    for name, value in {"first_byte_at": 2.0, "usage": TOLD, **fields}.items():
        setattr(request, name, value)
    return request


async def test_what_was_told_is_what_is_charged() -> None:
    assert used(asked(), 10.0) == estimate.MeteredTokens(7, 5, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"grant": None},
        {"sent_at": None},
        {"first_byte_at": None, "outcome": "upstream_failed"},
        {"first_byte_at": None, "outcome": "timeout"},
        {"surface": next(surface for surface in OPENAI_SURFACES if not surface.generates)},
    ],
)
async def test_where_no_neuron_worked_for_the_client_nothing_is_charged(fields: dict[str, Any]) -> None:
    assert used(asked(**fields), 10.0) == estimate.NOTHING_USED


async def test_a_client_that_hung_up_before_the_answer_pays_for_the_time() -> None:
    left = asked(first_byte_at=None, outcome="client_gone", usage=None)
    assert used(left, 1.0).completion == 0, "it was gone at once"
    assert used(left, 1e6).completion == EXPECTED.bound.completion == 100, "and never for more than it asked for"


async def test_a_stream_that_was_cut_short_is_charged_with_what_was_sent() -> None:
    """What an event near the cut says was true when the answer began."""
    cut = asked(is_stream=True, outcome="client_gone", generated=40, usage=Usage(7, 1))
    assert used(cut, 10.0) == estimate.MeteredTokens(7, 40, 0)
    whole = asked(is_stream=True, outcome="ok", generated=40, usage=Usage(7, 1))
    assert used(whole, 10.0).completion == 1


async def test_what_is_not_told_is_guessed_and_what_is_told_is_kept() -> None:
    request = asked(is_stream=True, generated=3, usage=Usage(None, 5))
    charged = used(request, 10.0)
    assert charged.completion == 5 and charged.prompt > 0


def test_tokens_of_a_stream_are_counted_by_its_marks_and_else_by_its_events() -> None:
    marked: Any = Written(9, [ChoiceTokens(0, [1, 2]), ChoiceTokens(1, [3])], [ChoiceTokens(0, [4])])
    assert generated_tokens(marked) == 4
    unmarked: Any = Written(9)
    assert generated_tokens(unmarked) == 9
