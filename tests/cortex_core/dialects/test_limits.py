"""Every limit of a body, at it and one beyond it, in each dialect that has the field; and the table that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import (
    anthropic_messages,
    limits,
    openai_chat,
    openai_completions,
    openai_responses,
)
from cortex_core.dialects.json_body import decode_object, model_name
from cortex_core.errors import ApiError

from tests.counting import assert_linear, peak_bytes, steps

REFERENCE = Path(__file__).parents[3] / "docs/reference/http-api.md"
ROW = re.compile(r"^\| `(MAX_[A-Z_]+)` \| ([\d,]+)\b.*", re.MULTILINE)

NOT_OF_A_BODY = {"MAX_TOKENS_CEILING", "MAX_WHOLE_ANSWER_BYTES"}
"""Clamped to, and of an answer. What other servers' answers are held to is in `openai_chat_client/`."""

Parse = Callable[[bytes], Request]
Body = dict[str, Any]

TURN = {"role": "user", "content": "hi"}
ITEM = {"type": "message", **TURN}
FUNCTION = {"name": "f", "parameters": {}}
CHAT_TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}
CLAUDE_TOOL = {"name": "f", "input_schema": {}}


def chat(**fields: Any) -> tuple[Parse, Body]:
    return openai_chat.parse, {"model": "m", "messages": [TURN], **fields}


def completion(**fields: Any) -> tuple[Parse, Body]:
    return openai_completions.parse, {"model": "m", "prompt": "hi", **fields}


def responses(**fields: Any) -> tuple[Parse, Body]:
    return openai_responses.parse, {"model": "m", "input": [ITEM], **fields}


def messages(**fields: Any) -> tuple[Parse, Body]:
    return anthropic_messages.parse, {"model": "m", "max_tokens": 1, "messages": [TURN], **fields}


def count_tokens(**fields: Any) -> tuple[Parse, Body]:
    return anthropic_messages.parse_count_tokens, {"model": "m", "messages": [TURN], **fields}


ALL = (chat, completion, responses, messages, count_tokens)
OPENAI = (chat, completion, responses)


def nested(depth: int) -> list[Any]:
    """So many arrays within each other."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def named(dialect: Any, name: str) -> Iterator[tuple[tuple[Parse, Body], str]]:
    """A name of every kind, and where it stands."""
    if dialect is chat:
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
        yield chat(tools=[{**CHAT_TOOL, "function": {**FUNCTION, "name": name}}]), "tools[0].function.name"
        yield chat(tools=[{"type": "custom", "custom": {"name": name}}]), "tools[0].custom.name"
        place = "messages[0].tool_calls[0].function.name"
        yield chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]), place
        yield chat(messages=[{"role": "function", "name": name, "content": "x"}]), "messages[0].name"
        yield chat(messages=[{"role": "tool", "tool_call_id": "c", "name": name, "content": "x"}]), "messages[0].name"
    elif dialect is responses:
        call = {"type": "function_call", "call_id": "c", "name": name, "arguments": "{}"}
        yield responses(tools=[{**FLAT_TOOL, "name": name}]), "tools[0].name"
        yield responses(tools=[{"type": "namespace", "name": name, "tools": [FLAT_TOOL]}]), "tools[0].name"
        yield responses(input=[ITEM, call]), "input[1].name"
        yield responses(input=[ITEM, {**call, "name": "f", "namespace": name}]), "input[1].namespace"
    else:
        call = {"type": "tool_use", "id": "c", "name": name, "input": {}}
        yield dialect(tools=[{**CLAUDE_TOOL, "name": name}]), "tools[0].name"
        yield dialect(messages=[TURN, {"role": "assistant", "content": [call]}]), "messages[1].content[0].name"


def asked(limit: str, count: int) -> Iterator[tuple[tuple[Parse, Body], str | None]]:
    """Requests that have `count` of what a limit counts, and the field that is named beyond it."""
    text = "x" * min(count, 10_000)
    if limit == "MAX_DEPTH":
        yield from ((dialect(unknown=nested(count - 1)), None) for dialect in ALL)
    elif limit == "MAX_CONTAINERS":
        for dialect in ALL:
            here = len(re.findall(r"[\[{]", json.dumps(dialect()[1])))
            yield dialect(unknown=[[]] * (count - here - 1)), None
    elif limit == "MAX_VALUES":
        for dialect in ALL:
            rest = json.dumps(dialect()[1])
            here = len(re.findall(r"[\[{,]", rest)) + 1  # what stands before the array
            yield dialect(unknown=[1] * (count - here)), None
    elif limit == "MAX_MODEL_NAME":
        yield from ((dialect(model=text), "model") for dialect in ALL)
    elif limit == "MAX_MESSAGES":
        yield from ((dialect(messages=[TURN] * count), "messages") for dialect in (chat, messages, count_tokens))
        yield responses(input=[ITEM] * count), "input"
    elif limit == "MAX_PARTS":
        part = {"type": "text", "text": ""}
        for dialect in (chat, messages, count_tokens):
            contents = [[part] * (count // 2), [part] * (count - count // 2)]
            yield dialect(messages=[TURN, *({**TURN, "content": content} for content in contents)]), "messages"
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        calls = {"role": "assistant", "content": None, "tool_calls": [call] * count}
        yield chat(messages=[calls]), "messages"
        result = {"type": "tool_result", "tool_use_id": "c", "content": [part] * (count - 1)}
        yield messages(messages=[TURN, {"role": "user", "content": [result]}]), "messages"
        yield responses(input=[ITEM, {**ITEM, "content": [{**part, "type": "input_text"}] * count}]), "input"
        thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}] * count}
        yield responses(input=[ITEM, thought]), "input"
    elif limit == "MAX_DATA_URL_HEAD":
        head, end = "data:image/png", ";base64,"
        url = head + ";a=" + "b" * (count - len(head) - len(end) - 3) + end + "AAAA"
        image = {"type": "image_url", "image_url": {"url": url}}
        yield chat(messages=[{**TURN, "content": [image]}]), "messages[0].content[0].image_url.url"
        image = {"type": "input_image", "image_url": url}
        yield responses(input=[{**ITEM, "content": [image]}]), "input[0].content[0].image_url"
    elif limit == "MAX_TEMPLATE_KWARGS_BYTES":
        kwargs = {"k": "x" * (count - 9)}
        yield from ((dialect(chat_template_kwargs=kwargs), "chat_template_kwargs") for dialect in (chat, responses))
    elif limit == "MAX_TOOLS":
        names = [f"f{number}" for number in range(count)]
        flat = [{**FLAT_TOOL, "name": name} for name in names]
        claude = [{**CLAUDE_TOOL, "name": name} for name in names]
        yield chat(tools=[{**CHAT_TOOL, "function": {**FUNCTION, "name": name}} for name in names]), "tools"
        yield responses(tools=flat), "tools"
        yield responses(tools=[{"type": "namespace", "name": "n", "tools": flat}]), "tools[0].tools"
        spaces = [{"type": "namespace", "name": f"n{n}", "tools": flat[n::2]} for n in range(2)]
        yield responses(tools=spaces), f"tools[1].tools[{count // 2 - 1}]"
        added = {"type": "additional_tools", "tools": flat[1:]}
        yield responses(tools=flat[:1], input=[ITEM, added]), f"input[1].tools[{count - 2}]"
        for dialect in (messages, count_tokens):
            yield dialect(tools=claude), "tools"
            blocks = [
                {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}
                for tool in claude[1:]
            ]
            place = f"messages[1].content[{count - 2}].tool.definition"
            yield dialect(tools=claude[:1], messages=[TURN, {"role": "system", "content": blocks}]), place
        choice = {"mode": "auto", "tools": [CHAT_TOOL] * count}
        yield (
            chat(tools=[CHAT_TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": choice}),
            "tool_choice.allowed_tools.tools",
        )
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_TOOL] * count}
        yield responses(tools=[FLAT_TOOL], tool_choice=choice), "tool_choice.tools"
    elif limit == "MAX_NAME":
        for dialect in (chat, responses, messages, count_tokens):
            yield from named(dialect, text)
    elif limit == "MAX_NAMESPACE_CHARACTERS":
        members = [{**FLAT_TOOL, "name": f"f{number}"} for number in range(8)]
        space = {"type": "namespace", "name": "n", "tools": members}
        most = {**space, "description": "x" * (count // 8)}
        rest = {**space, "name": "m", "tools": members[:1], "description": "x" * (count % 8)}
        yield responses(tools=[most, rest]), "tools[1].description"
    elif limit == "MAX_STOP_SEQUENCES":
        stops = [f"s{number}" for number in range(count)]
        yield from ((dialect(stop=stops), "stop") for dialect in OPENAI)
        yield messages(stop_sequences=stops), "stop_sequences"
    elif limit == "MAX_STOP_CHARACTERS":
        yield from ((dialect(stop=["a", text]), "stop[1]") for dialect in OPENAI)
        yield chat(stop=text), "stop[0]"
        yield messages(stop_sequences=[text]), "stop_sequences[0]"
    elif limit == "MAX_ALL_STOP_CHARACTERS":
        stops = [f"{number:03}" + "x" * 197 for number in range(count // 200)]
        stops += ["y" * (count % 200)] if count % 200 else []
        yield from ((dialect(stop=stops), "stop") for dialect in OPENAI)
        yield messages(stop_sequences=stops), "stop_sequences"
    elif limit == "MAX_LOGIT_BIAS":
        yield from ((dialect(logit_bias={str(i): 1 for i in range(count)}), "logit_bias") for dialect in OPENAI)
    elif limit == "MAX_TOKEN_ID_DIGITS":
        yield from ((dialect(logit_bias={"1" * count: 1}), f"logit_bias.{'1' * count}") for dialect in OPENAI)
    elif limit == "MAX_TOKEN_ID":
        yield completion(prompt=[1, count]), "prompt[1]"
        yield completion(prompt=[[1, count]]), "prompt[0][1]"
    elif limit == "MAX_CHOICES":
        yield chat(n=count), "n"
        yield completion(n=count), "n"
        if count % 2 or count <= limits.MAX_CHOICES:
            yield completion(n=count // 2 + count % 2, prompt=["a", "b"]), "n"
    elif limit == "MAX_PROMPTS":
        yield completion(prompt=["a"] * count), "prompt"
        yield completion(prompt=[[1]] * count), "prompt"
    elif limit == "MAX_TOP_LOGPROBS":
        yield chat(logprobs=True, top_logprobs=count), "top_logprobs"
        yield responses(top_logprobs=count), "top_logprobs"
    elif limit == "MAX_CACHE_SALT":
        yield from ((dialect(cache_salt=text), "cache_salt") for dialect in OPENAI)
    elif limit == "MAX_LOGPROBS":
        yield completion(logprobs=count), "logprobs"
    else:
        raise AssertionError(f"no request for {limit}")


LIMITS = {
    name: value
    for name, value in vars(limits).items()
    if name.startswith("MAX_") and name not in NOT_OF_A_BODY and not name.startswith("MAX_FOREIGN_")
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_body_is_taken_at_a_limit_and_refused_beyond_it(limit: str) -> None:
    """H2 (`stop`), H9 (messages, parts, tools) and H15 (values) among them."""
    most = LIMITS[limit]
    within, beyond = list(asked(limit, most)), list(asked(limit, most + 1))
    assert within and beyond
    for (parse, body), _ in within:
        parse(json.dumps(body, separators=(",", ":")).encode())
    for (parse, body), param in beyond:
        with pytest.raises(ApiError) as caught:
            parse(json.dumps(body, separators=(",", ":")).encode())
        error = caught.value
        assert error.status == 400
        assert error.param == param, error.message
        assert param is None or param in error.message
        if limit != "MAX_DATA_URL_HEAD" and limit not in ("MAX_TOKEN_ID_DIGITS", "MAX_TOKEN_ID"):
            assert str(most) in error.message, error.message
        assert len(error.message) < 1000


def test_the_table_of_limits_is_true() -> None:
    table = {name: int(value.replace(",", "")) for name, value in ROW.findall(REFERENCE.read_text("utf-8"))}
    named = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}
    del named["MAX_TOKENS_CEILING"]
    assert {name: table.get(name) for name in named} == named


# ---------------------------------------------------------------- H9: counted before anything is made of it


def refused(read: Callable[[bytes], object], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body)
    return caught.value


@pytest.mark.parametrize("parse", [openai_chat.parse, anthropic_messages.parse_count_tokens])
def test_H9_200000_one_letter_messages_are_counted_and_refused(parse: Parse) -> None:
    body = b'{"model":"m","messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 200_000) + b"]}"
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.param == "messages"
    assert "200000" in caught.value.message and str(limits.MAX_MESSAGES) in caught.value.message


def test_H9_a_body_of_empty_arrays_is_not_decoded() -> None:
    body = b'{"model":"m","messages":[' + b"[]," * 3_000_000 + b"1]}"
    assert peak_bytes(lambda: refused(decode_object, body)) < 2 * len(body) + 100_000


def test_marks_in_strings_count_for_nothing() -> None:
    code = "{[," * 400_000
    for content in (code, code + '\\"', code.replace("[", '["')):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()
        assert openai_chat.parse(body).turns[0].text() == content


def test_what_is_no_json_is_counted_in_linear_work() -> None:
    for piece in (b'"', b'\\"', b'{"', b'["a",', b'{"a":"\\"', b"[]"):
        body = piece * 1_000_000
        with pytest.raises(ApiError):
            decode_object(body)


def test_a_model_that_is_no_name_is_not_decoded() -> None:
    """The name is looked up where nothing else may be done yet."""
    for value in (b"[" + b"[]," * 1_000_000 + b"1]", b'"' + b"x" * 3_000_000 + b'"', b'{"a":' + b"1" * 100 + b"}"):
        body = b'{"model":' + value + b"}"
        assert refused(model_name, body).param == "model"
        assert peak_bytes(lambda body=body: refused(model_name, body)) < 2 * len(body) + 100_000
    assert model_name(b'{"model":"' + b"\\ud83d\\ude00" * 256 + b'"}') == "\U0001f600" * 256


def test_settings_that_items_change_cost_no_copy_of_the_body_each() -> None:
    def updated(n: int) -> int:
        items = [ITEM, *[{"type": "configuration_update"}] * n]
        body = {"model": "m", "input": items, **{f"k{i}": 1 for i in range(n)}}
        encoded = json.dumps(body).encode()
        return steps(lambda: openai_responses.parse(encoded))

    assert_linear(updated, 100)


def test_namespaces_that_are_allowed_often_are_looked_up_once() -> None:
    def allowed(n: int) -> int:
        members = [{**FLAT_TOOL, "name": f"f{i}"} for i in range(n)]
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "namespace", "name": "n"}] * n}
        tools = [{"type": "namespace", "name": "n", "tools": members}]
        encoded = json.dumps(responses(tools=tools, tool_choice=choice)[1]).encode()
        return steps(lambda: openai_responses.parse(encoded))

    assert_linear(allowed, 200)


def test_names_that_are_unknown_are_quoted_in_part() -> None:
    name = "x" * limits.MAX_NAME
    for parse, body in (
        chat(tools=[CHAT_TOOL], tool_choice={"type": "function", "function": {"name": name}}),
        responses(tools=[FLAT_TOOL], tool_choice={"type": "function", "name": name}),
        messages(tools=[CLAUDE_TOOL], tool_choice={"type": "tool", "name": name}),
    ):
        with pytest.raises(ApiError) as caught:
            parse(json.dumps(body).encode())
        assert len(caught.value.message) < 200
