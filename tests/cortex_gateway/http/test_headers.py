from __future__ import annotations

from cortex_gateway.http.headers import (
    FROM_FOREIGN,
    FROM_NEURON,
    TO_FOREIGN,
    TO_NEURON,
    foreign_headers,
    identity_headers,
    request_headers,
    response_headers,
)
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=30).map(str.encode)
VALUES = st.binary(max_size=20).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
HEADERS = st.lists(
    st.tuples(NAMES | st.sampled_from([*sorted(TO_NEURON), b"connection", b"cookie", b"authorization"]), VALUES)
)
OURS = {"x-request-id", "x-cortex-hop", "x-cortex-resolved-model", "user-agent", "accept-encoding"}


@given(HEADERS)
def test_H12_whatever_a_client_sends_only_listed_headers_leave(given: list[tuple[bytes, bytes]]) -> None:
    to_neuron = request_headers(given, request_id="req_1", model="m")
    assert {name.lower() for name in to_neuron} <= OURS | {name.decode() for name in TO_NEURON}
    for is_translated in (False, True):
        foreign = foreign_headers(given, request_id="req_1", is_translated=is_translated, secrets={"x-org": "9"})
        assert {name.lower() for name in foreign} <= OURS | {"x-org"} | {name.decode() for name in TO_FOREIGN}
        assert not any(name.startswith("x-cortex") for name in foreign)
        assert foreign.getall("x-request-id") == ["req_1"] and foreign.getall("x-org") == ["9"]


@given(HEADERS)
def test_H12_whatever_a_server_answers_only_listed_headers_come_back(given: list[tuple[bytes, bytes]]) -> None:
    assert {name for name, _ in response_headers(given)} <= FROM_NEURON
    assert {name for name, _ in response_headers(given, is_foreign=True)} <= FROM_FOREIGN


def test_H12_a_header_that_is_claimed_for_the_hop_does_not_go_on_wherever_it_stands() -> None:
    for sent in (
        [(b"connection", b"close, Accept"), (b"accept", b"a"), (b"content-type", b"b")],
        [(b"accept", b"a"), (b"content-type", b"b"), (b"connection", b"close, Accept")],
    ):
        for forwarded in (
            request_headers(sent, request_id="r", model="m"),
            foreign_headers(sent, request_id="r", is_translated=False, secrets={}),
        ):
            assert "accept" not in forwarded and forwarded["content-type"] == "b"


def test_credentials_hop_by_hop_and_our_own_headers_do_not_reach_a_neuron() -> None:
    given = [
        (b"host", b"gateway"),
        (b"authorization", b"Bearer secret"),
        (b"x-api-key", b"secret"),
        (b"cookie", b"secret"),
        (b"connection", b"keep-alive, x-nominated"),
        (b"x-nominated", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"accept-encoding", b"gzip"),
        (b"content-length", b"12"),
        (b"x-cortex-resolved-model", b"spoofed"),
        (b"x-cortex-hop", b"0"),
        (b"x-helexa-account-id", b"spoofed"),
        (b"x-request-id", b"spoofed"),
        (b"anthropic-version", b"2023-06-01"),
        (b"anthropic-beta", b"a"),
        (b"anthropic-beta", b"b"),
        (b"content-type", b"application/json"),
        (b"x-claude-code-session-id", b"s1"),
    ]
    forwarded = request_headers(given, request_id="req_1", model="org/mödel")
    assert sorted(forwarded.items()) == [
        ("anthropic-beta", "a"),
        ("anthropic-beta", "b"),
        ("anthropic-version", "2023-06-01"),
        ("content-type", "application/json"),
        ("x-claude-code-session-id", "s1"),
        ("x-cortex-hop", "1"),
        ("x-cortex-resolved-model", "org/mödel"),
        ("x-request-id", "req_1"),
    ]


def test_a_name_that_no_header_can_carry_is_left_out() -> None:
    assert "x-cortex-resolved-model" not in request_headers([], request_id="req_1", model="a\r\nb: c")
    assert len(identity_headers("req_1", model="a\nb")) == 2


def test_a_neurons_headers_pass_without_those_the_server_sets_itself() -> None:
    raw = [
        (b"Content-Type", b"application/json"),
        (b"Retry-After", b"3"),
        (b"Content-Length", b"9"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"close"),
        (b"Date", b"today"),
        (b"Server", b"neuron"),
        (b"X-Request-Id", b"theirs"),
        (b"Set-Cookie", b"a=b"),
    ]
    assert response_headers(raw) == [(b"content-type", b"application/json"), (b"retry-after", b"3")]


def test_both_request_ids_are_on_every_answer() -> None:
    assert identity_headers("req_1") == [(b"x-request-id", b"req_1"), (b"request-id", b"req_1")]
    assert (b"x-cortex-model", "ä".encode()) in identity_headers("req_1", model="ä")
