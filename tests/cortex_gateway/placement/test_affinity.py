"""Who knows a prompt: sessions, beginnings, and a memory that does not grow."""

from __future__ import annotations

import msgspec
from cortex_gateway.placement.affinity import UNKNOWN, Affinity, Shares
from cortex_gateway.placement.replicas import Replica, choose
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
