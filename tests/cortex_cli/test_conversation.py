"""A chat: turns that grow, text as it comes, and an answer that is whole or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cortex_cli.conversation import Conversation, _timing, ask_once, run_chat
from cortex_cli.exits import CliError


class Gateway:
    """Streams what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
        self.asked.append(json.loads(json.dumps(body)))
        for chunk in self.answers.pop(0):
            yield "message", chunk if isinstance(chunk, str) else json.dumps(chunk)


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 3}}
HELLO = [delta(role="assistant"), delta(reasoning_content="hm"), delta(content="Hel"), delta(content="lo"), USAGE]


def chat(*answers: list[Any], **settings: Any) -> tuple[Conversation, Gateway]:
    gateway: Any = Gateway(*answers)
    return Conversation(gateway, "m", **settings), gateway


def test_what_was_said_is_said_again_without_the_thoughts() -> None:
    conversation, gateway = chat([*HELLO, "[DONE]"], [delta(content="Bye"), "[DONE]"], system="Be brief.")
    texts: list[str] = []
    thoughts: list[str] = []
    conversation.ask("Hi", on_text=texts.append, on_reasoning=thoughts.append)
    conversation.ask("And?", on_text=texts.append, on_reasoning=thoughts.append)
    assert (texts, thoughts) == (["Hel", "lo", "Bye"], ["hm"])
    assert [(turn["role"], turn["content"]) for turn in gateway.asked[1]["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
    ]


def test_only_what_was_asked_for_is_set() -> None:
    conversation, gateway = chat(["[DONE]"])
    conversation.ask("x", on_text=print, on_reasoning=print)
    assert set(gateway.asked[0]) == {"model", "stream", "stream_options", "messages"}
    conversation, gateway = chat(["[DONE]"], max_tokens=5, temperature=0.0, think=False)
    conversation.ask("x", on_text=print, on_reasoning=print)
    body = gateway.asked[0]
    assert (body["max_completion_tokens"], body["temperature"]) == (5, 0.0)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HELLO, "broke off"),
        ([delta(content="a"), {"error": {"message": "out of memory"}}], "out of memory"),
        ([], "broke off"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error_and_no_turn(answer: list[Any], message: str) -> None:
    conversation, gateway = chat(answer, ["[DONE]"])
    with pytest.raises(CliError, match=message):
        conversation.ask("x", on_text=lambda text: None, on_reasoning=lambda text: None)
    conversation.ask("again", on_text=print, on_reasoning=print)
    assert [turn["role"] for turn in gateway.asked[1]["messages"]] == ["user", "user"]


@pytest.mark.parametrize(
    ("first", "ended", "tokens", "text"),
    [
        (None, 2.0, 0, "no text, 0 tokens, 2.00 s"),
        (0.5, 2.5, 1, "first token 0.50 s, 1 tokens"),
        (0.5, 2.5, 5, "first token 0.50 s, 5 tokens, 2.0 tok/s"),
        (0.5, 0.5, 5, "first token 0.50 s, 5 tokens"),
    ],
)
def test_the_rate_is_of_the_tokens_behind_the_first(first: float | None, ended: float, tokens: int, text: str) -> None:
    assert _timing(0.0, first, ended, tokens) == text


def test_the_answer_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    conversation, _ = chat([*HELLO, "[DONE]"])
    ask_once(conversation, "Hi")
    shown = capsys.readouterr()
    assert shown.out == "Hello\n" and shown.err.startswith("hm\n") and "3 tokens" in shown.err


def test_a_chat_passes_over_nothing_and_ends_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, gateway = chat(["[DONE]"], ["[DONE]"])
    typed = iter(["", "  ", "one", "/bye", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    run_chat(conversation)
    assert [body["messages"][-1]["content"] for body in gateway.asked] == ["one"]


def test_the_end_of_the_input_ends_a_chat_with_a_farewell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    run_chat(chat()[0], farewell="stopping")
    assert capsys.readouterr().err.endswith("stopping\n")
