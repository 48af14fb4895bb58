"""The state of one request: whose turn it takes, and when it may be interrupted or go elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cortex_core.entitlements import KeyEntry
from cortex_core.errors import ApiError
from cortex_gateway.http.body import ClientGone
from cortex_gateway.identity.principal import KeyMeters, Principal
from cortex_gateway.placement.decision import Hold, Load
from cortex_gateway.relay.request_state import MAX_MOVES, described, new_request_id

from tests.cortex_gateway.relay.harness import request_state

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Stream:
    """As much of an answer as a request asks it for."""

    def __init__(self, *, is_resumable: bool) -> None:
        self.is_resumable = is_resumable


def test_no_two_requests_have_one_id() -> None:
    assert new_request_id().startswith("req_") and new_request_id() != new_request_id()


async def test_turns_are_taken_by_accounts_and_without_a_key_by_addresses() -> None:
    request = request_state(client="192.0.2.1")
    assert request.queue_key == "192.0.2.1"
    request.principal = Principal(KeyEntry(key_id="ci", account_id="acme", key="k"), KeyMeters())
    assert request.queue_key == "account:acme"
    assert request_state().queue_key is None


async def test_the_trace_that_a_client_names_is_known_by_its_id() -> None:
    assert request_state([(b"traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode())]).trace_id == TRACE
    assert request_state([(b"traceparent", b"nonsense")]).trace_id is None


async def test_the_first_reason_to_end_a_request_wins() -> None:
    request = request_state()
    reason = ApiError("timeout", "silent")
    request.interrupt(reason)
    request.client_left()
    assert request.interruption is reason
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)


async def test_nothing_interrupts_the_last_bytes() -> None:
    request = request_state()
    request.settle()
    request.interrupt(ClientGone())
    await asyncio.sleep(0)
    assert request.interruption is None and not request.leaves()


async def test_a_request_leaves_a_lost_node_while_nothing_of_an_answer_has_come() -> None:
    request = request_state()
    request.begin_attempt("alpha", "hot")
    assert request.leaves() and not request.leaves(), "once for each attempt"
    request.begin_attempt("beta", "hot")
    request.answers(5.0)
    assert not request.leaves()


@pytest.mark.parametrize("is_resumable", [True, False])
async def test_an_answer_that_has_begun_leaves_where_another_node_can_go_on(is_resumable: bool) -> None:
    request = request_state()
    request.begin_attempt("alpha", "hot")
    request.answers(5.0)
    stream: Any = Stream(is_resumable=is_resumable)
    request.stream = stream
    assert request.leaves() is is_resumable


async def test_a_request_moves_so_often_and_no_more() -> None:
    request = request_state()
    moves = 0
    while True:
        request.begin_attempt("alpha", "hot")
        if not request.leaves():
            break
        moves += 1
    assert moves == MAX_MOVES == request.num_moves and request.num_attempts == MAX_MOVES + 1


async def test_the_first_byte_is_that_of_the_first_attempt_that_answered() -> None:
    request = request_state()
    request.begin_attempt("alpha", "hot")
    request.answers(5.0)
    request.begin_attempt("beta", "hot")
    assert not request.has_answered
    request.answers(9.0)
    assert request.first_byte_at == 5.0 and request.has_answered


async def test_who_is_refused_before_it_is_placed_hears_so_in_the_headers() -> None:
    request = request_state()
    assert b"x-cortex-route" not in dict(request.own_headers())
    request.resolved = "org/name"
    request.limit_headers = lambda: [(b"x-ratelimit-limit-requests", b"5")]
    headers = dict(request.own_headers())
    assert headers[b"x-cortex-route"] == b"refused" and headers[b"x-ratelimit-limit-requests"] == b"5"
    request.begin_attempt("alpha", "hot")
    assert dict(request.own_headers())[b"x-cortex-route"] == b"hot"


def test_what_a_request_waits_for_is_told_in_a_word() -> None:
    load = Load("alpha", "m", victims=("old",))
    assert described(load) == ("load", {"cortex.node": "alpha", "cortex.evicted": ("old",)})
    word, attributes = described(Hold("alpha", "loading"))
    assert (word, attributes["cortex.reason"]) == ("hold", "loading")
