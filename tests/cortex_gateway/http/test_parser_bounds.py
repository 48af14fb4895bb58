"""What a gateway reads of a body on its loop: bodies that are made to be slow or large to read."""

from __future__ import annotations

import json

import pytest
from cortex_core.dialects.limits import MAX_PROMPTS
from cortex_core.errors import ApiError
from cortex_gateway.identity.estimate import estimate
from cortex_gateway.observability.redaction import clean_body
from cortex_gateway.placement.session_hints import RequestHints
from cortex_gateway.surfaces.envelope import MAX_FIELDS, read_envelope, with_model

from tests.counting import peak_bytes

MB = 1_000_000
KEY = b"x-anthropic-billing-header: cc_version=2; "


def body_of(prompt: bytes) -> bytes:
    return b'{"model":"m","prompt":' + prompt + b"}"


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        (b'"text"', 1),
        (b"[]", 1),
        (b"[1,2,3]", 1),
        (b'["a"]', 1),
        (b' [ "a" , "b\\"]" , "" ] ', 3),
        (b"[[1,2],[3],\n[4]]", 3),
        (b'[[1], "a"]', 2),
        (b"[" + b"1," * MB + b"1]", 1),
        (b"[" + b'"",' * MB + b'""]', MAX_PROMPTS),
        (b"[" + b"[]," * MB + b"[]]", MAX_PROMPTS),
        (b'["' + b"\\n" * MB + b'","b"]', 2),
    ],
)
def test_H9_prompts_are_counted_without_being_read(prompt: bytes, count: int) -> None:
    """Ten million token ids were 700 MB, before anybody had looked at the key."""
    body = body_of(prompt)
    assert estimate(body, None).num_choices == count
    assert peak_bytes(lambda: estimate(body, None)) < 3 * len(body) + 100_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"' + b"k" * MB + b'":1,"model":"m"}',
        b'{"' + b"\\n" * MB + b'":1,"mod\\u0065l":"m"}',
        b"{" + b",".join(b'"%d":1' % number for number in range(100_000)) + b',"model":"m"}',
        b'{"tools":[{"model":"m"}],"model":"m","x":[' + b"1," * MB + b"1]}",
    ],
)
def test_a_model_is_renamed_in_a_few_bytes_for_each_of_the_body(body: bytes) -> None:
    assert read_envelope(with_model(body, "new")).model == "new"
    assert peak_bytes(lambda: with_model(body, "new")) < 8 * len(body) + 100_000


def test_a_body_that_would_have_to_be_put_together_anew_may_not_have_too_many_fields() -> None:
    body = b'{"mod\\u0065l":"m"' + b"".join(b',"%d":1' % number for number in range(MAX_FIELDS)) + b"}"
    with pytest.raises(ApiError) as caught:
        with_model(body, "new")
    assert caught.value.status == 400 and str(MAX_FIELDS) in caught.value.message


def test_a_secret_of_any_length_is_taken_out_in_a_few_bytes_for_each() -> None:
    for unit in (b"k", b"\\n"):
        body = b'{"password":"' + unit * MB + b'","user":"u"}'
        assert clean_body(body) == b'{"password":"[removed]","user":"u"}'
        assert peak_bytes(lambda body=body: clean_body(body)) < 3 * len(body)


def test_only_the_first_block_of_a_system_prompt_is_looked_at() -> None:
    block = json.dumps({"type": "text", "text": KEY.decode(), "cache_control": {"type": "ephemeral"}}).encode()
    rest = b'{"type":"text","text":"You are"}'
    known = RequestHints([], b'{"model":"m","system":[' + rest + b"]}").prompt()
    given = RequestHints([], b'{"model":"m","system":[' + block + b"," + rest + b"]}").prompt()
    assert KEY not in given and rest in given and rest in known
    many = b'{"model":"m","system":[' + block + b",1" * MB + b"]}"
    assert peak_bytes(lambda: RequestHints([], many).prompt()) < 8 * len(many)
    assert KEY not in RequestHints([], many).prompt()
