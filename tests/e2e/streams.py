"""Streams of every dialect as a client reads them, and what two readings of one must have in common."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from tests.e2e.fleet_process import MODEL

CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Streams of every dialect: long ones, sampled ones, with thinking, with two choices, a tool call, logprobs."""
    found: list[tuple[str, dict[str, Any]]] = []
    for index in range(count):
        messages = [{"role": "user", "content": f"Count from {index % 5} to {50 + index % 11}."}]
        common: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": 400, "temperature": 0}
        tool = {"name": "get_weather", "description": "Get the weather", "parameters": WEATHER}
        match index % 10:
            case 0:
                found.append((CHAT, {**common, "messages": messages, "stream_options": {"include_usage": True}}))
            case 1:
                found.append((MESSAGES, {**common, "messages": messages}))
            case 2:
                sampled = {"temperature": 1.5, "seed": index, "n": 2, "ignore_eos": True, "max_tokens": 150}
                found.append((CHAT, {**common, "messages": messages, **sampled}))
            case 3:
                found.append((COMPLETIONS, {**common, "prompt": "def main():", "ignore_eos": True, "max_tokens": 150}))
            case 4:
                thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
                found.append((MESSAGES, {**common, "messages": messages, **thinking}))
            case 5:
                asked_plainly = {**common, "input": messages[0]["content"], "max_output_tokens": common["max_tokens"]}
                del asked_plainly["max_tokens"]
                found.append((RESPONSES, asked_plainly))
            case 6:
                # Text that is held back, as it may be the beginning of a stop string, holds its figures back too.
                logged = {"logprobs": True, "top_logprobs": 2, "stop": ["1 2 3 4 6", " 9 9"]}
                found.append((CHAT, {**common, "messages": messages, **logged}))
            case 7:
                logged = {"logprobs": 1, "echo": True, "ignore_eos": True, "max_tokens": 150}
                found.append((COMPLETIONS, {**common, "prompt": "def main():", **logged}))
            case 8:
                asked_plainly = {**common, "input": messages[0]["content"], "max_output_tokens": common["max_tokens"]}
                del asked_plainly["max_tokens"]
                logged = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
                found.append((RESPONSES, {**asked_plainly, **logged}))
            case _:
                asked = [{"role": "user", "content": "What is the weather in Paris and London?"}]
                tools = [{"type": "function", "function": tool}]
                found.append((CHAT, {**common, "messages": asked, "tools": tools}))
    return found


class Figure(float):
    """A log-probability. Computed with one token at a time and with many at once, the same one differs a little."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-3

    __hash__ = float.__hash__


def figures(logprobs: Any) -> list[Any]:
    """Each token with its log-probability, of any of the three forms."""
    if not logprobs:
        return []
    if isinstance(logprobs, list):
        return [(entry["token"], Figure(entry["logprob"])) for entry in logprobs]
    if "content" in logprobs:
        return figures(logprobs["content"])
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"], strict=True)
    return [(token, None if value is None else Figure(value), at) for token, value, at in pairs]


def comparable(path: str, raw: bytes) -> tuple[list[Any], Any]:
    """What the client reads, without what differs between any two answers (ids, times) and between any two caches."""
    logged: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    other: list[Any] = []
    ids = set()
    number = -1
    for block in raw.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = b"".join(line[6:] for line in block.split(b"\n") if line.startswith(b"data: "))
        if not data or data == b"[DONE]":
            continue
        event = json.loads(data)
        if event.get("type") == "ping":
            continue
        assert "error" not in event, event
        if "choices" in event:
            ids.add(event["id"])
            for choice in event["choices"]:
                delta = choice.get("delta", choice)
                logged.setdefault(str(choice["index"]), []).extend(figures(choice.get("logprobs")))
                for kind in ("content", "text", "reasoning_content"):
                    if isinstance(delta.get(kind), str):
                        key = f"{choice['index']}:{kind}"
                        texts[key] = texts.get(key, "") + delta[kind]
                for call in delta.get("tool_calls", ()):
                    key = f"{choice['index']}:call {call['index']}"
                    texts[key] = texts.get(key, "") + call["function"].get("name", "") + call["function"]["arguments"]
                if choice.get("finish_reason"):
                    other.append((choice["index"], choice["finish_reason"]))
            if event.get("usage"):
                other.append((event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]))
        elif "sequence_number" in event:
            assert event["sequence_number"] == (number := number + 1), event
            if event["type"].endswith(".delta"):
                key = f"{event['output_index']}:{event['type']}"
                texts[key] = texts.get(key, "") + event["delta"]
                logged.setdefault(key, []).extend(figures(event.get("logprobs")))
            elif event["type"] == "response.output_text.done":
                logged.setdefault("done", []).extend(figures(event.get("logprobs")))
            elif event["type"] == "response.created":
                ids.add(event["response"]["id"])
            elif event["type"] == "response.completed":
                usage = event["response"]["usage"]
                other.append((usage["input_tokens"], usage["output_tokens"]))
                assert [item["type"] for item in event["response"]["output"]] == ["message"]
        elif event["type"] == "content_block_delta":
            for kind, text in event["delta"].items():
                if kind not in ("type", "signature"):
                    key = f"{event['index']}:{kind}"
                    texts[key] = texts.get(key, "") + text
        elif event["type"] == "message_start":
            ids.add(event["message"]["id"])
        elif event["type"] == "message_delta":
            other.append((event["delta"]["stop_reason"], event["usage"]["output_tokens"]))
        elif event["type"] in ("content_block_start", "content_block_stop"):
            other.append((event["type"], event["index"]))
    assert len(ids) == 1, ids
    return [*sorted(texts.items()), *sorted(logged.items())], other


async def read_all(
    url: str, asked: list[tuple[str, dict[str, Any]]], when_all_have_begun: Callable[[], None] = lambda: None
) -> list[bytes]:
    """Every stream to its end; the callback runs once each of them has sent its first text."""
    begun = 0
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def read(path: str, body: dict[str, Any]) -> bytes:
            nonlocal begun
            raw = b""
            has_begun = False
            async with session.post(url + path, json=body, headers={"anthropic-version": "2023-06-01"}) as response:
                assert response.status == 200, await response.text()
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if not has_begun and raw.count(b"data: ") >= 4:
                        has_begun = True
                        begun += 1
                        if begun == len(asked):
                            when_all_have_begun()
            return raw

        return await asyncio.gather(*(read(path, body) for path, body in asked))
