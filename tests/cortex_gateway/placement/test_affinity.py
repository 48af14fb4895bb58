"""Who knows a prompt: sessions, beginnings, and a memory that does not grow."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cortex_gateway.placement.affinity import UNKNOWN, Affinity, Shares
from cortex_gateway.placement.replicas import Replica, choose
from cortex_gateway.placement.session_hints import RequestHints
from hypothesis import given
from hypothesis import strategies as st


class Request(msgspec.Struct, frozen=True):
    """Hints, as a test gives them."""

    text: bytes = b""
    key: str | None = None
    cache_salt: str = ""

    def session(self) -> str | None:
        return self.key

    def prompt(self) -> bytes:
        return self.text


def small(**limits: int) -> Affinity:
    return Affinity(**{"block_bytes": 4, **limits})


# ---------------------------------------------------------------------------------------------- memory


def test_H10_what_one_salt_knows_another_does_not() -> None:
    memory = small()
    memory.record("m", Request(b"abcdefgh", "s", "one"), "alpha")
    assert memory.shares("m", Request(b"abcdefgh", "s", "one")).by_node == {"alpha": 1.0}
    assert memory.shares("m", Request(b"abcdefgh", None, "one")).by_node == {"alpha": 1.0}
    for salt in ("", "two"):
        assert not memory.shares("m", Request(b"abcdefgh", "s", salt)).by_node


def test_a_share_is_how_much_of_the_prompt_a_node_has_seen_in_one_piece_from_the_start() -> None:
    affinity = small()
    affinity.record("m", Request(b"aaaabbbbcccc"), "alpha")
    affinity.record("m", Request(b"aaaaxxxx"), "beta")
    assert affinity.shares("m", Request(b"aaaabbbbzzzzzzzz")).by_node == {"alpha": 0.5, "beta": 0.25}
    assert affinity.shares("m", Request(b"zzzzbbbbcccc")) == UNKNOWN
    assert affinity.shares("other", Request(b"aaaabbbbcccc")) == UNKNOWN
    assert affinity.shares("m", Request(b"aaa")) == UNKNOWN


def test_a_session_is_known_whole_where_its_last_turn_was() -> None:
    affinity = small()
    affinity.record("m", Request(b"aaaa", "s"), "alpha")
    affinity.record("m", Request(b"aaaa", "s"), "beta")
    assert affinity.shares("m", Request(b"anything", "s")) == Shares({"beta": 1.0}, "session")
    assert affinity.shares("m", Request(b"aaaa", "new")).kind == "prefix"


@given(st.lists(st.tuples(st.binary(max_size=40), st.none() | st.text(max_size=3), st.sampled_from("abcdefg"))))
def test_memory_is_bounded_and_shares_are_shares(requests: list[tuple[bytes, str | None, str]]) -> None:
    affinity = small(max_sessions=5, max_prefixes=10)
    for text, key, node in requests:
        hints = Request(text, key)
        known = affinity.shares("m", hints)
        assert all(0 < share <= 1 for share in known.by_node.values())
        affinity.record("m", hints, node, known)
        assert len(affinity) <= 15
        after = affinity.shares("m", hints).by_node
        if key is not None:
            assert after == {node: 1.0}
        elif 1 <= len(text) // 4 <= 10:
            assert after[node] == 1.0


# ---------------------------------------------------------------------------------------------- choice


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=2, max_size=6),
    st.floats(0, 3),
)
def test_without_a_match_the_least_loaded_is_taken_whatever_beta(loads: list[tuple[int, int]], beta: float) -> None:
    replicas = [Replica(node=f"n{i}", load=load, capacity=capacity) for i, (load, capacity) in enumerate(loads)]
    best, reason = choose(replicas, UNKNOWN, beta)
    assert best.load == min(replica.load for replica in replicas)
    assert reason == "loaded"
    assert choose(list(reversed(replicas)), UNKNOWN, beta) == (best, reason)


def test_a_match_outweighs_a_little_load_and_load_outweighs_a_match() -> None:
    """llm-d and sglang learnt it the hard way: affinity alone sends everything to one node until it drowns."""
    known = Shares({"alpha": 1.0}, "session")
    for load, expected in ((0, "alpha"), (3, "alpha"), (30, "beta")):
        chosen, reason = choose(
            [Replica(node="alpha", load=load, capacity=8), Replica(node="beta", load=0)], known, 1.0
        )
        assert (chosen.node, reason) == (expected, "session" if expected == "alpha" else "loaded")


def test_a_suspect_node_has_to_be_much_better() -> None:
    suspect, healthy = Replica(node="alpha", load=0, is_suspect=True), Replica(node="beta", load=1)
    assert choose([suspect, healthy], UNKNOWN, 1.0)[0] == healthy
    assert choose([suspect, healthy], Shares({"alpha": 1.0}), 1.0)[0] == suspect
    assert choose([suspect, Replica(node="beta", load=9)], UNKNOWN, 1.0)[0] == suspect


def test_equals_take_turns_and_then_the_name_decides() -> None:
    older, newer = Replica(node="beta", load=1, last_used=5.0), Replica(node="alpha", load=1, last_used=9.0)
    assert choose([newer, older], UNKNOWN, 1.0)[0] == older
    twins = [Replica(node="beta", load=1), Replica(node="alpha", load=1)]
    assert choose(twins, UNKNOWN, 1.0)[0].node == "alpha"


# ---------------------------------------------------------------------------------------------- what requests say


def hints(body: dict[str, Any], **headers: str) -> RequestHints:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return RequestHints(raw, json.dumps(body, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x_claude_code_session_id": "s1"}, {}),
        ({"session_id": "s1"}, {}),
        ({"thread_id": "s1"}, {}),
        ({"x_session_affinity": "s1"}, {}),
        ({"x_session_id": "s1"}, {}),
        ({}, {"prompt_cache_key": "s1"}),
        ({}, {"metadata": {"user_id": '{"device_id":"d","session_id":"s1"}'}}),
    ],
)
def test_sessions_of_known_clients_are_recognised(headers: dict[str, str], body: dict[str, Any]) -> None:
    session = hints(body, **headers).session()
    assert session is not None and "s1" in session
    assert hints(body, **headers).session() == session


def test_the_agents_of_a_session_are_told_apart_and_a_person_is_no_session() -> None:
    one = hints({}, x_claude_code_session_id="s", x_claude_code_agent_id="a").session()
    two = hints({}, x_claude_code_session_id="s", x_claude_code_agent_id="b").session()
    assert one != two
    assert hints({"metadata": {"user_id": "alice"}, "user": "alice"}).session() is None
    assert RequestHints([], b'{"metadata": 7, "prompt_cache_key": []}').session() is None
    assert RequestHints([], b"not json").prompt() == b""


def test_each_turn_begins_with_the_whole_of_the_last_one() -> None:
    messages = [{"role": "user", "content": "x" * 3000}]
    first = hints({"model": "m", "messages": messages, "temperature": 0.1}).prompt()
    messages = [*messages, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    second = hints({"model": "m", "temperature": 0.9, "messages": messages}).prompt()
    assert second.startswith(first.rstrip(b"\n")[:-1])


def test_what_changes_with_every_turn_of_claude_code_is_not_looked_at() -> None:
    def turn(attribution: str, marked: int) -> bytes:
        texts = [
            {"type": "text", "text": "You are"},
            {"type": "text", "text": "an agent"},
            {"type": "text", "text": "!"},
        ]
        texts[marked] = {**texts[marked], "cache_control": {"type": "ephemeral"}}  # type: ignore[dict-item]
        named = {"type": "text", "text": f"x-anthropic-billing-header: cch={attribution};"}
        return hints({"system": [named, *texts[:1]], "messages": [{"role": "user", "content": texts[1:]}]}).prompt()

    assert turn("11", 1) == turn("22", 2)
    assert b"an agent" in turn("11", 1) and b"You are" in turn("11", 1)
