"""`cortex demo`: what it starts, asks and shows."""

from __future__ import annotations

import json
import re
import signal
from typing import Any, Self

import pytest
from click.testing import CliRunner
from cortex_cli.commands import demo as module
from cortex_cli.commands.demo import demo, usage_text

URL, METRICS = "http://127.0.0.1:1", "http://127.0.0.1:2"


class Fleet:
    """Is up at once, and is waited for until it is interrupted."""

    made: list[Fleet]

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.model, self.gateway_url, self.metrics_url = settings["model"], URL, METRICS
        self.is_stopped = False
        Fleet.made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.is_stopped = True

    def start(self, **options: Any) -> None: ...

    def wait(self) -> None:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions that were asked once."""
    Fleet.made = []
    questions: list[str] = []
    monkeypatch.setattr(module, "DemoFleet", Fleet)
    monkeypatch.setattr(module, "ask_once", lambda conversation, question: questions.append(question))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return questions


def test_one_question_is_answered_and_nothing_else_is_printed(asked: list[str]) -> None:
    result = CliRunner().invoke(demo, ["--once", "What is 12+30?"])
    assert (result.exit_code, result.output, asked) == (0, "", ["What is 12+30?"])
    assert Fleet.made[0].settings["model"] == "cortex/demo" and Fleet.made[0].is_stopped


def test_without_a_terminal_it_serves_until_it_is_interrupted(asked: list[str]) -> None:
    result = CliRunner().invoke(demo, ["--gateway-port", "5", "--neuron-port", "6", "--metrics-port", "7"])
    assert result.exit_code == 0 and usage_text(URL, METRICS, "cortex/demo") in result.output
    assert Fleet.made[0].is_stopped and not asked
    assert Fleet.made[0].settings == {"model": "cortex/demo", "gateway_port": 5, "neuron_port": 6, "metrics_port": 7}


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_starts_nothing(port: str) -> None:
    assert CliRunner().invoke(demo, ["--gateway-port", port]).exit_code == 2
    assert not Fleet.made


def test_what_is_shown_can_be_pasted() -> None:
    """Every address is the fleet's, the model is named, and the bodies are JSON that a shell passes on."""
    text = usage_text(URL, METRICS, "org/name")
    assert set(re.findall(r"http://[\d.:]+", text)) == {URL, METRICS}
    for body in re.findall(r"-d '(.*)'", text):
        assert json.loads(body)["model"] == "org/name"
    for code in ("from openai import OpenAI", "from anthropic import Anthropic"):
        assert code in text
