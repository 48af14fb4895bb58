"""From dialogues to token ids with a mask of the tokens that are learnt; mirrors `chat_template.jinja`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .dialogue import Copied, Dialogue, Given, Message, Spelled

NO_THOUGHT = "<think>\n\n</think>\n\n"
TOOLS_OPENING = "# Tools\n\nFunctions that may be called, as JSON within <tools></tools>:\n<tools>"
TOOLS_CLOSING = (
    "\n</tools>\n\nA call is JSON within <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
)


class Encoder:
    """Encodes dialogues with one tokenizer."""

    def __init__(self, tokenizer_file: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.vocabulary: dict[str, int] = self.tokenizer.get_vocab()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, markup tokens included."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @functools.lru_cache(maxsize=50_000)  # noqa: B019 - one encoder lives as long as the process
    def _copied(self, text: str) -> tuple[int, ...]:
        """Return the ids that ` text` has in its source, with the leading space taken off the first one.

        Where no token is the first one without its space, its characters are written one by one: how the tokenizer
        would split them follows no rule that could be learnt, and the letters of tokens are learnt anyway.
        """
        spaced = self.ids(" " + text)
        first = self.tokenizer.id_to_token(spaced[0])[1:]
        if not first:
            return tuple(spaced[1:])
        if first in self.vocabulary:
            return (self.vocabulary[first], *spaced[1:])
        return (*(self.vocabulary[byte] for byte in first), *spaced[1:])

    def piece_ids(self, piece: str) -> list[int]:
        """Return the ids of one piece of an answer."""
        if isinstance(piece, Spelled):
            return [id_ for character in piece for id_ in self.ids(character)]
        if isinstance(piece, Copied):
            return list(self._copied(str(piece)))
        return self.ids(piece)

    def encode(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """Return the ids of the whole dialogue and which of them the loss counts."""
        ids: list[int] = []
        learnt: list[bool] = []

        def add(new: list[int], is_learnt: bool = False) -> None:
            ids.extend(new)
            learnt.extend([is_learnt] * len(new))

        messages = dialogue.messages
        last_query = max(index for index, message in enumerate(messages) if message.role == "user")
        opening = self.system_text(dialogue.messages, dialogue.tools)
        if opening:
            add(self.ids(opening))
        for index, message in enumerate(messages[:-1]):
            if message.role == "user":
                add(self.ids(f"<|im_start|>user\n{message.text()}<|im_end|>\n"))
            elif message.role == "tool":
                is_first = messages[index - 1].role != "tool"
                is_last = messages[index + 1].role != "tool"
                opening = "<|im_start|>user" if is_first else ""
                closing = "<|im_end|>\n" if is_last else ""
                add(self.ids(f"{opening}\n<tool_response>\n{message.text()}\n</tool_response>{closing}"))
            elif message.role == "assistant":
                self._add_history(message, dialogue.is_thinking and index > last_query, add)
        self._add_answer(messages[-1], dialogue.is_thinking, add)
        return ids, learnt

    def _add_history(self, message: Message, with_thought: bool, add: Any) -> None:
        """Add an earlier answer; its first token is ambiguous (thinking or not) and therefore not learnt."""
        pieces = message.answer_pieces()
        thought = f"<think>\n{message.thought}\n</think>\n\n" if with_thought and message.thought else ""
        header = self.ids("<|im_start|>assistant\n")
        opening = self.ids(thought) if thought else []
        # An earlier answer comes back tokenised as one text; where that differs from how the model wrote it, one
        # dialogue in four shows that form, and only the written form is learnt.
        block = self.ids("".join(pieces)) + self.ids("<|im_end|>")
        written = [id_ for piece in pieces for id_ in self.piece_ids(piece)] + self.ids("<|im_end|>")
        is_written = block == written or sum(block) % 4 != 0
        answer = written if is_written else block
        add(header)
        add(opening)
        add(answer[:1], bool(thought) and is_written)
        add(answer[1:], is_written)
        add(self.ids("\n"))

    def _add_answer(self, message: Message, is_thinking: bool, add: Any) -> None:
        add(self.ids("<|im_start|>assistant\n"))
        if is_thinking:
            add(self.ids(f"<think>\n{message.thought}\n</think>\n\n"), True)
        else:
            add(self.ids(NO_THOUGHT))
        for piece in message.answer_pieces():
            add(self.piece_ids(piece), not isinstance(piece, Given))
        add(self.ids("<|im_end|>"), True)

    @staticmethod
    def system_text(messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]) -> str:
        """Return the opening system turn with the tools, or nothing."""
        system = messages[0].text() if messages[0].role == "system" else ""
        if tools:
            listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            body = (system + "\n\n" if system else "") + TOOLS_OPENING + listed + TOOLS_CLOSING
            return f"<|im_start|>system\n{body}<|im_end|>\n"
        return f"<|im_start|>system\n{system}<|im_end|>\n" if messages[0].role == "system" else ""
