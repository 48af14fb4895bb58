"""What a request says of its session, and the beginning of its prompt."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_gateway.placement.session_hints import RequestHints

from tests.cortex_gateway.placement.harness import hints


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
