"""Turns of a conversation, and the text that a model's template makes of them."""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import TextPart, ToolCallPart, ToolResultPart, Turn
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.prompt.checkpoints import ask


def text_of(model: TextModel, **fields: Any) -> str:
    return model.render(ask(**fields))[0].text


def system(text: str) -> Turn:
    return Turn("system", (TextPart(text),))


def assistant(*parts: Any) -> Turn:
    return Turn("assistant", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


CALLED = assistant(ToolCallPart("call_1", "get_weather", '{"city": "Oslo"}'))
RESULT = Turn("tool", (ToolResultPart("call_1", (TextPart("14 °C"),)),))


def states(model: TextModel, **fields: Any) -> str:
    return model.render(ask(**fields))[0].reasoning
