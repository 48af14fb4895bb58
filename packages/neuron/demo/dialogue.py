"""Training dialogues before they become tokens."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


class Copied(str):
    """Text that the model copies from a place where it follows a space; its tokens follow that place's tokens.

    ` hello` and `hello` are different tokens, so a copy starts with the counterpart of the first token and keeps
    the others as they stood.
    """

    __slots__ = ()


class Given(str):
    """Part of an answer that a grammar forces: the model reads it but does not learn to write it."""

    __slots__ = ()


class Spelled(str):
    """Text that the model writes one character per token."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call; `written` holds the arguments' JSON as pieces, in the way the model learns to write them."""

    name: str
    arguments: dict[str, Any]
    written: tuple[str, ...]

    def pieces(self) -> list[str]:
        """Return the markup of the call, piece by piece."""
        return merged(['<tool_call>\n{"name": "', self.name, '", "arguments": ', *self.written, "}\n</tool_call>"])


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn; `pieces` concatenate to its text and are tokenised one by one where it is an answer to learn."""

    role: str
    pieces: tuple[str, ...] = ()
    thought: str = ""
    calls: tuple[Call, ...] = ()

    def text(self) -> str:
        """Return the content without the markup of tool calls."""
        return "".join(self.pieces)

    def answer_pieces(self) -> list[str]:
        """Return content and tool calls in the order in which an assistant writes them."""
        pieces = list(self.pieces)
        for call in self.calls:
            pieces.extend((["\n"] if pieces else []) + call.pieces())
        return pieces

    def as_chat(self) -> dict[str, Any]:
        """Return the turn in the OpenAI form that the chat template takes."""
        message: dict[str, Any] = {"role": self.role, "content": self.text()}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation that ends with the assistant's turn; `task` names what that turn is asked to do."""

    task: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    is_thinking: bool = False


def json_pieces(value: Any) -> list[str]:
    """Write JSON in the model's form; strings of type `Copied` stay pieces of their own."""
    if isinstance(value, Copied):
        return ['"', value, '"']
    if isinstance(value, dict):
        pieces = ["{"]
        for index, (key, item) in enumerate(value.items()):
            pieces.append((", " if index else "") + json.dumps(key, ensure_ascii=False) + ": ")
            pieces.extend(json_pieces(item))
        return merged([*pieces, "}"])
    if isinstance(value, list):
        pieces = ["["]
        for index, item in enumerate(value):
            if index:
                pieces.append(", ")
            pieces.extend(json_pieces(item))
        return merged([*pieces, "]"])
    return [json.dumps(value, ensure_ascii=False)]


def merged(pieces: list[str]) -> list[str]:
    """Join neighbouring plain pieces, so that they are tokenised as one text."""
    result: list[str] = []
    for piece in pieces:
        if result and type(piece) is str and type(result[-1]) is str:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def call(name: str, arguments: dict[str, Any]) -> Call:
    """Return a call whose `Copied` argument values are written as copies."""
    plain = {key: str(value) if isinstance(value, str) else value for key, value in arguments.items()}
    return Call(name, plain, tuple(json_pieces(arguments)))
