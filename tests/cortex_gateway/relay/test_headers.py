from __future__ import annotations

from cortex_gateway.relay.headers import identity_headers, request_headers, response_headers


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
