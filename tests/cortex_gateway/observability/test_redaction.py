"""Secrets go, the rest stays byte for byte, and a body that was cut in its middle is as clean as a whole one."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest
from cortex_gateway.observability.redaction import clean_body, clean_headers, clean_query, without_images
from hypothesis import given
from hypothesis import strategies as st

SECRET = b"hunter2-hunter2-hunter2"


@pytest.mark.parametrize(
    "name",
    (
        b"authorization Authorization x-api-key api-key cookie set-cookie proxy-authorization x-auth-token"
        b" x-goog-api-key ocp-apim-subscription-key x-client-secret x-amz-signature"
    ).split(),
)
def test_headers_that_hold_secrets_keep_their_names_only(name: bytes) -> None:
    assert clean_headers([(name, SECRET)]) == [(name, b"[removed]")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"anthropic-version", b"2023-06-01"),
        (b"x-ratelimit-limit-tokens", b"100"),
        (b"idempotency-key", b"abc"),
        (b"user-agent", b"claude-cli/1.0 (external, cli)"),
        (b"x-stainless-helper-method", b"stream"),
    ],
)
def test_other_headers_stay(name: bytes, value: bytes) -> None:
    assert clean_headers([(name, value)]) == [(name, value)]


def test_a_key_in_a_header_that_is_not_for_keys_goes_too() -> None:
    assert clean_headers([(b"x-note", b"use sk-cortex-0123456789abcdef, please")]) == [
        (b"x-note", b"use [removed], please")
    ]


def test_a_query_in_a_body_may_have_its_ampersands_escaped() -> None:
    """As Go's encoder writes them."""
    body = rb'{"url": "https://h.example/a?b=c\u0026X-Amz-Signature=hunter2"}'
    assert clean_body(body) == rb'{"url": "https://h.example/a?b=c\u0026X-Amz-Signature=[removed]"}'


@pytest.mark.parametrize(
    ("query", "clean"),
    [
        (b"", b""),
        (b"beta=true", b"beta=true"),
        (b"api_key=hunter2&beta=true", b"api_key=[removed]&beta=true"),
        (b"beta=true&key=hunter2", b"beta=true&key=[removed]"),
        (b"access_token=a;X-Amz-Signature=b", b"access_token=[removed];X-Amz-Signature=[removed]"),
        (b"monkey=1&tokens=2", b"monkey=1&tokens=2"),
        (b"session_token=a&X-Amz-Security-Token=b", b"session_token=[removed]&X-Amz-Security-Token=[removed]"),
    ],
)
def test_queries(query: bytes, clean: bytes) -> None:
    assert clean_query(query) == clean


BODIES: list[dict[str, Any]] = [
    {"tools": [{"type": "mcp", "server_url": "https://x/?token=%s&a=1", "authorization": "%s"}]},
    {"tools": [{"type": "mcp", "headers": {"Authorization": "Bearer %s", "X-API-Key": "%s"}}]},
    {"mcp_servers": [{"url": "https://x", "authorization_token": "%s"}]},
    {"api_key": "%s", "password": 'with \\" a quote %s', "client_secret": "%s", "openai_api_key": "%s"},
    {"messages": [{"role": "user", "content": "my key is sk-proj-%s"}]},
]


@pytest.mark.parametrize("body", BODIES)
def test_fields_that_hold_secrets(body: dict[str, Any]) -> None:
    raw = json.dumps(body).replace("%s", SECRET.decode()).encode()
    clean = clean_body(raw)
    assert SECRET not in clean and b"[removed]" in clean
    json.loads(clean)
    for end in range(0, len(raw), 7):
        assert SECRET not in clean_body(raw[:end])


def test_what_only_looks_like_a_field_stays() -> None:
    body = json.dumps({"messages": [{"content": 'set {"api_key": "…"} in cortex.toml, then token = 5'}]}).encode()
    assert clean_body(body) == body


def images(size: int) -> tuple[bytes, bytes, str]:
    data = base64.b64encode(random.Random(size).randbytes(size)).decode()
    openai = {
        "messages": [{"content": [{"image_url": {"url": f"data:image/png;base64,{data}"}}, {"text": "what is it?"}]}]
    }
    anthropic = {"messages": [{"content": [{"source": {"media_type": "image/png", "data": data}}, {"text": "this?"}]}]}
    return json.dumps(openai).encode(), json.dumps(anthropic).encode(), data


def test_images_are_shortened_and_the_rest_of_the_body_is_there() -> None:
    for body in images(30_000)[:2]:
        short = without_images(body)
        assert len(short) < 300 and b"[40000 characters]" in short
        assert json.loads(short).keys() == json.loads(body).keys()
        assert short[-20:] == body[-20:]


def test_several_images_and_none() -> None:
    body = json.dumps([json.loads(images(3000)[0]), json.loads(images(6000)[1]), json.loads(images(3000)[1])]).encode()
    assert without_images(body).count(b"characters]") == 3
    for small in (
        images(30)[0],
        b'{"data": "words, not base64, %s"}' % (b"and more " * 200),
        b'{"data": [1]}',
        b'"data"',
    ):
        assert without_images(small) == small


@given(st.lists(st.sampled_from([b'"data"', b";base64,", b'"', b":", b"A" * 600, b" ", b"\\", b"x"]), max_size=12))
def test_whatever_the_bytes_what_is_taken_out_is_base64(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    short = without_images(body)
    assert len(short) <= len(body) and short.replace(b"A", b"").count(b'"') == body.count(b'"')
