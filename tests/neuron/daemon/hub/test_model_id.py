from __future__ import annotations

import pytest
from neuron.daemon.hub.model_id import ModelId, ModelIdError, parse_model_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-8B", ModelId("", "Qwen", "Qwen3-8B")),
        ("helexa:acme/model", ModelId("helexa", "acme", "model")),
        ("file:/models/x", ModelId("file", path="/models/x")),
        ("file:relative/a:b", ModelId("file", path="relative/a:b")),
    ],
)
def test_ids_are_read_and_shown_alike(text: str, expected: ModelId) -> None:
    assert parse_model_id(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("name", "org/name"),
        (":org/name", "scheme before the colon is empty"),
        ("a/b:org/name", "must not contain a slash"),
        ("/name", "organisation"),
        ("org/", "name after the slash"),
        ("x:org/na:me", "must not contain a colon"),
        ("org/a/b", "org/name"),
        ("../name", "org/name"),
        ("org/..", "org/name"),
        ("org/na\0me", "org/name"),
        ("file:", "no path"),
    ],
)
def test_what_is_no_id_says_why(text: str, reason: str) -> None:
    with pytest.raises(ModelIdError, match=reason):
        parse_model_id(text)
