"""What pages of other origins are told."""

from __future__ import annotations

from cortex_core.access.cors import answer_headers, preflight_headers
from hypothesis import given
from hypothesis import strategies as st


def test_H6_an_answer_names_the_page_and_never_all_pages() -> None:
    answer = dict(answer_headers(b"https://app.example"))
    assert answer[b"access-control-allow-origin"] == b"https://app.example"
    assert answer[b"vary"] == b"origin"
    assert b"access-control-allow-credentials" not in answer


def test_H6_a_preflight_allows_what_sdks_send() -> None:
    usual = {name.strip() for name in dict(preflight_headers([]))[b"access-control-allow-headers"].split(b",")}
    assert {b"authorization", b"content-type", b"x-api-key", b"anthropic-version", b"openai-organization"} <= usual
    asked = b"authorization,x-api-key,anthropic-beta,anthropic-dangerous-direct-browser-access,x-stainless-os,X-Title"
    allowed = dict(preflight_headers([(b"access-control-request-headers", asked)]))[b"access-control-allow-headers"]
    assert allowed.replace(b" ", b"") == asked.lower()


def test_H6_a_preflight_allows_no_header_that_servers_say_to_each_other() -> None:
    asked = b"x-cortex-secret, x-cortex-hop, x-helexa-account-id, x-forwarded-for, accept, a b, \xff, "
    assert (
        dict(preflight_headers([(b"access-control-request-headers", asked)]))[b"access-control-allow-headers"]
        == b"accept"
    )


@given(st.binary(max_size=200))
def test_H6_no_preflight_breaks_the_answer(asked: bytes) -> None:
    for _, value in preflight_headers([(b"access-control-request-headers", asked)]):
        assert not set(value) & set(b"\r\n\0*")


def test_a_page_of_the_public_network_is_let_into_the_private_one_where_it_is_allowed_at_all() -> None:
    asked = [(b"access-control-request-private-network", b"true")]
    assert (b"access-control-allow-private-network", b"true") in preflight_headers(asked)
    assert not any(name.endswith(b"private-network") for name, _ in preflight_headers([]))
