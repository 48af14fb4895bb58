"""What one streamed event costs in each dialect: time of `Projector.feed`, one core, no I/O.

Run: python tests/bench/project.py [rounds]
Prints microseconds per event for each round and the best, beside the cost of building the same chunk from
dictionaries with msgspec, which is what the projectors save.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions
from cortex_core.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
    TopLogprob,
)

NUM_EVENTS = 20_000
IDENTITY: dict[str, Any] = {"response_id": "r-0123456789abcdef", "created": 1_760_000_000, "model": "org/some-model"}

text = TextDelta(0, " tokens")
reasoning = ReasoningDelta(0, " tokens")
arguments = ToolCallArguments(0, 0, '"city": ')
logprob = TokenLogprob(
    " tokens", -0.25, tuple(b" tokens"), tuple(TopLogprob(f"t{i}", -1.0 - i, (116, 48 + i)) for i in range(5))
)


def projection(dialect: Any, event: Event, request: Request) -> Callable[[], bytes]:
    projector = dialect.Projector(request, **IDENTITY)
    projector.begin(10)
    if isinstance(event, ToolCallArguments):
        projector.feed(ToolCallStart(0, 0, "ab", "get_weather"))
    feed = projector.feed
    return lambda: feed(event)


def from_dictionaries() -> bytes:
    chunk = {
        "id": IDENTITY["response_id"],
        "object": "chat.completion.chunk",
        "created": IDENTITY["created"],
        "model": IDENTITY["model"],
        "choices": [{"index": 0, "delta": {"content": text.text}, "finish_reason": None}],
    }
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def microseconds(call: Callable[[], bytes]) -> float:
    start = time.perf_counter()
    for _ in range(NUM_EVENTS):
        call()
    return (time.perf_counter() - start) / NUM_EVENTS * 1e6


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chat = Request(model="m")
    cases = {
        "chat text": projection(openai_chat, text, chat),
        "chat reasoning": projection(openai_chat, reasoning, chat),
        "chat tool arguments": projection(openai_chat, arguments, chat),
        "chat text, 5 top logprobs": projection(
            openai_chat, TextDelta(0, " tokens", (logprob,)), Request(model="m", logprobs=5)
        ),
        "completions text": projection(
            openai_completions, text, openai_completions.parse(b'{"model": "m", "prompt": "x"}')
        ),
        "messages text": projection(anthropic_messages, text, chat),
        "messages thinking": projection(anthropic_messages, reasoning, chat),
        "messages tool arguments": projection(anthropic_messages, arguments, chat),
        "(chat text from dictionaries)": from_dictionaries,
    }
    print(f"python {platform.python_version()}, msgspec {msgspec.__version__}, {platform.machine()}")
    results = {name: [round(microseconds(call), 2) for _ in range(rounds)] for name, call in cases.items()}
    print(f"{'event':<32}{'best µs':>8}  rounds")
    for name, times in results.items():
        print(f"{name:<32}{min(times):>8.2f}  {json.dumps(times)}")


if __name__ == "__main__":
    main()
