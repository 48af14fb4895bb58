"""Requests in the very shapes that agents send, whole tool loops included, through a gateway over two neurons: on its
native path, and by translation in front of servers that speak only OpenAI chat.

The shapes were recorded from the clients; what is long and means nothing to a server is shortened.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.fleet_of_neurons import Daemon
from tests.e2e.fleet_process import MODEL, call

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DESCRIPTION = "Current weather in a city"
QUESTION = "What is the weather in Oslo?"
RESULT = '{"temperature": 14, "condition": "cloudy"}'


def post(front: Daemon, path: str, body: dict[str, Any], headers: dict[str, str]) -> list[dict[str, Any]]:
    """The data of every event of a streamed answer."""
    status, answered, answer = call(front.url, "POST", path, body, headers)
    assert status == 200, answer
    assert answered["content-type"].startswith("text/event-stream")
    is_translated = front.name == "openai" and not path.startswith("/v1/chat/")
    assert ("x-cortex-translated" in answered) == is_translated
    lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_both_neurons_take_part(front: Daemon) -> None:
    """While one is at work, the other gets what neither has seen before."""
    with (
        openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=120) as client,
        client.chat.completions.with_streaming_response.create(
            model=MODEL,
            stream=True,
            max_tokens=3000,
            messages=[{"role": "user", "content": f"{front.name}: say something that has no end. " * 10}],
            extra_body={"ignore_eos": True},
        ) as endless,
    ):
        assert next(endless.iter_lines())
        messages = [{"role": "user", "content": f"What else? This is for {front.name}, and new. " * 10}]
        body = {"model": MODEL, "max_tokens": 3, "messages": messages}
        status, answered, answer = call(front.url, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        assert {endless.headers["x-cortex-node"], answered["x-cortex-node"]} == {"n0", "n1"}


# ---------------------------------------------------------------- Claude Code


CLAUDE_HEADERS = {
    "accept": "application/json",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "per-turn-control-2026-07-01,mid-conversation-tool-changes-2026-07-01,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "authorization": "Bearer none",
    "x-app": "cli",
    "x-claude-code-session-id": "8e2ab2d5-0b9f-4e6e-9c3c-0d1f5a1a2b3c",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}


def claude_body(messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    mark = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": MODEL,
        "max_tokens": 32000,
        "stream": True,
        "messages": messages,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.329.f09; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are a coding agent.", **mark},
            {"type": "text", "text": "Answer briefly.", **mark},
        ],
        "tools": [
            {
                "name": "get_weather",
                "description": DESCRIPTION,
                "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", **CITY},
                "eager_input_streaming": True,
            },
            {
                "name": "DeferredToolPlaceholder",
                "description": "",
                "input_schema": {"type": "object"},
                "defer_loading": True,
            },
        ],
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": '{"device_id": "d", "session_id": "s"}'},
        "safeguards": {"cyber": "standard"},
        **changes,
    }


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client puts together of a message stream: its blocks, as it will send them back."""
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            texts.append("")
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                blocks[event["index"]]["signature"] = delta["signature"]
            else:
                texts[event["index"]] += delta.get("text", delta.get("thinking", delta.get("partial_json", "")))
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
        else:
            block[block["type"]] = text
    (ending,) = [event["delta"] for event in events if event["type"] == "message_delta"]
    return {"role": "assistant", "content": blocks, "stop_reason": ending["stop_reason"]}


def test_claude_code_completes_a_tool_loop(front: Daemon) -> None:
    assert call(front.url, "HEAD", "/")[0] == 200 and call(front.url, "HEAD", "/api/hello")[0] == 200
    system = {
        "role": "system",
        "content": [{"type": "text", "text": "Reminder: be brief.", "cache_control": {"type": "ephemeral"}}],
        "output_config": {"effort": "high"},
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Context."}, {"type": "text", "text": QUESTION}]},
        system,
    ]
    first = message_of(post(front, "/v1/messages?beta=true", claude_body(messages), CLAUDE_HEADERS))
    assert first["stop_reason"] == "tool_use"
    (use,) = [block for block in first["content"] if block["type"] == "tool_use"]
    assert use["name"] == "get_weather" and use["input"]["city"]
    for block in first["content"]:
        if block["type"] == "thinking":
            assert block["thinking"] == "" and block["signature"]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": RESULT}]}
    messages[1] = {"role": "system", "content": "Reminder: be brief."}  # the next request moves the form, not the text
    messages += [
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [{**result, "cache_control": {"type": "ephemeral"}}]},
    ]
    second = message_of(post(front, "/v1/messages?beta=true", claude_body(messages), CLAUDE_HEADERS))
    assert second["stop_reason"] == "end_turn"
    assert any("14" in block["text"] for block in second["content"] if block["type"] == "text")


def test_claude_code_falls_back_to_the_same_body_without_a_stream_and_counts_it(front: Daemon) -> None:
    body = claude_body([{"role": "user", "content": "What is 12+30?"}], stream=False)
    status, _, answer = call(front.url, "POST", "/v1/messages?beta=true", body, CLAUDE_HEADERS)
    assert status == 200, answer
    usage = json.loads(answer)["usage"]
    size = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    counted = {name: body[name] for name in ("model", "messages", "system", "tools", "thinking")}
    status, _, answer = call(front.url, "POST", "/v1/messages/count_tokens?beta=true", counted, CLAUDE_HEADERS)
    assert status == 200 and json.loads(answer) == {"input_tokens": size}
    status, _, answer = call(front.url, "GET", "/v1/models?limit=1000", headers=CLAUDE_HEADERS)
    assert status == 200 and [entry["id"] for entry in json.loads(answer)["data"]] == [MODEL]


def test_claude_code_reads_the_numbers_of_a_prompt_that_is_too_long(front: Daemon) -> None:
    body = claude_body([{"role": "user", "content": "1 2 3 4 5 6 7 8 " * 20_000}], stream=False)
    status, _, answer = call(front.url, "POST", "/v1/messages?beta=true", body, CLAUDE_HEADERS)
    words = json.loads(answer)["error"]["message"].split()
    assert status == 400 and words[:4] == ["prompt", "is", "too", "long:"]
    assert int(words[4]) > int(words[7]) and words[5:7] == ["tokens", ">"] and words[8] == "maximum"


# ---------------------------------------------------------------- Codex


def codex_item(role: str, *texts: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "role": role, "id": f"msg_{role}{len(texts)}", "content": content}


def codex_body(items: list[dict[str, Any]]) -> dict[str, Any]:
    function = {"type": "function", "name": "get_weather", "description": DESCRIPTION, "strict": False}
    return {
        "model": MODEL,
        "stream": True,
        "input": items,
        "tools": [
            {**function, "parameters": CITY},
            {
                "type": "namespace",
                "name": "mcp__clock",
                "description": "",
                "tools": [{**function, "name": "get_time", "description": "Current time", "parameters": {}}],
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-abc",
        "client_metadata": {"x-codex-installation-id": "i"},
    }


CODEX_HEADERS = {
    "accept": "text/event-stream",
    "authorization": "Bearer none",
    "originator": "codex_exec",
    "session-id": "0199-abc",
    "thread-id": "0199-abc",
    "user-agent": "codex_exec/0.169.0",
}


def codex_items(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Codex takes of a stream: the items of `output_item.done`, if the stream ends as it should."""
    kinds = [event["type"] for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]
    assert events[-1]["response"]["usage"]["total_tokens"] > 0
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


def test_codex_completes_a_tool_loop(front: Daemon) -> None:
    items = [
        codex_item("developer", "You are a coding agent.", "Answer briefly."),
        codex_item("developer", "Sandbox: none."),
        codex_item("user", "<environment_context></environment_context>"),
        codex_item("user", QUESTION),
    ]
    first = codex_items(post(front, "/v1/responses", codex_body(items), CODEX_HEADERS))
    (called,) = [item for item in first if item["type"] == "function_call"]
    assert called["name"] == "get_weather" and json.loads(called["arguments"])["city"]
    output = {"type": "function_call_output", "call_id": called["call_id"], "output": RESULT}
    second = codex_items(post(front, "/v1/responses", codex_body([*items, *first, output]), CODEX_HEADERS))
    assert any("14" in item["content"][0]["text"] for item in second if item["type"] == "message")


# ---------------------------------------------------------------- chat: Zed, Cline, opencode, aider


FUNCTION = {"type": "function", "function": {"name": "get_weather", "description": DESCRIPTION, "parameters": CITY}}
USAGE = {"stream_options": {"include_usage": True}}
CHAT_SHAPES: dict[str, dict[str, Any]] = {
    "zed": {
        "max_completion_tokens": 4096,
        "temperature": 1.0,
        "stop": [],
        "tools": [FUNCTION],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "prompt_cache_key": "thread",
        "reasoning_effort": None,
        "seed": 3,
        **USAGE,
    },
    "cline": {"tools": [FUNCTION], "tool_choice": "auto", **USAGE},
    "opencode": {"max_tokens": 4096, "tools": [FUNCTION], "tool_choice": "auto", **USAGE},
}


def chat_message(events: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The assistant's message, with the checks that strict clients make of every chunk."""
    content, reasoning, calls, reason = "", "", [], ""
    assert events[0]["choices"][0]["delta"]["content"] == ""
    for event in events:
        assert event["object"] == "chat.completion.chunk" and event["id"] == events[0]["id"]
        assert event.get("usage") is None or event["usage"]["total_tokens"] > 0
        for choice in event["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    message: dict[str, Any] = {"role": "assistant", "content": content or None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message, reason


@pytest.mark.parametrize("client", CHAT_SHAPES)
def test_an_editor_completes_a_tool_loop(front: Daemon, client: str) -> None:
    mark = {"cache_control": {"type": "ephemeral"}} if client == "cline" else {}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a coding agent."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION, **mark}]},
    ]
    body = {"model": MODEL, "stream": True, **CHAT_SHAPES[client]}
    first, reason = chat_message(post(front, "/v1/chat/completions", {**body, "messages": messages}, {}))
    assert reason == "tool_calls"
    (called,) = first["tool_calls"]
    assert json.loads(called["function"]["arguments"])["city"]
    messages += [first, {"role": "tool", "tool_call_id": called["id"], "content": RESULT}]
    second, reason = chat_message(post(front, "/v1/chat/completions", {**body, "messages": messages}, {}))
    assert reason == "stop" and "14" in second["content"]


def test_aider_asks_with_made_up_turns_and_no_limits(front: Daemon) -> None:
    messages = [
        {"role": "system", "content": "Act as an expert software developer."},
        {"role": "user", "content": "I have no files."},
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "What is 12+30?"},
    ]
    body = {"model": MODEL, "stream": True, "temperature": 0, "messages": messages}
    answer, reason = chat_message(post(front, "/v1/chat/completions", body, {}))
    assert "42" in answer["content"] and reason == "stop"
