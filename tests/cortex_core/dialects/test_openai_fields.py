"""Fields that OpenAI's requests share, through chat: their values, their limits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.conversation import Reasoning, ResponseFormat, Sampling

from tests.cortex_core.dialects.openai_chat.harness import parse, refused


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}},
            ResponseFormat("json_schema", {"type": "object"}, "n", True),
        ),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, ResponseFormat("json_object", name="n")),
    ],
)
def test_response_format(response_format: Any, expected: ResponseFormat | None) -> None:
    assert parse(response_format=response_format).response_format == expected


def test_guided_json_is_the_older_way_to_ask_for_a_schema() -> None:
    assert parse(guided_json={"type": "object"}).response_format == ResponseFormat("json_schema", {"type": "object"})


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, "response_format.json_schema.schema"),
    ],
)
def test_a_bad_response_format_is_refused(response_format: Any, param: str) -> None:
    assert refused(response_format=response_format).param == param


def test_sampling() -> None:
    assert parse(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"15496": -100, "7": 1.5},
        seed=-3,
    ).sampling == Sampling(0.0, 0.5, 40, 0.05, -2.0, 2.0, 1.1, {15496: -100.0, 7: 1.5}, -3)
    unset = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "presence_penalty"))
    assert parse(**unset).sampling == Sampling()
    assert parse(top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", 2.01, "at most 2"),
        ("temperature", -0.1, "at least 0"),
        ("top_p", 1.01, "at most 1"),
        ("top_p", -1, "at least 0"),
        ("min_p", 1.5, "at most 1"),
        ("presence_penalty", 2.5, "at most 2"),
        ("presence_penalty", -2.5, "at least -2"),
        ("frequency_penalty", 3, "at most 2"),
        ("repetition_penalty", 0, "at least 0.01"),
        # Allowed once: as float32 it is zero, what is divided by it infinite, and the answer had no end.
        ("repetition_penalty", 5e-324, "at least 0.01"),
        ("top_k", -2, "at least -1"),
        ("max_tokens", 0, "at least 1"),
        ("max_completion_tokens", -5, "at least 1"),
        ("n", 0, "at least 1"),
        ("n", 129, "at most 128"),
        ("seed", 2**64, "at most"),
        ("stop", ["x"] * 65, "at most 64"),
    ],
)
def test_what_is_out_of_range_is_refused_with_field_and_limit(field: str, value: Any, limit: str) -> None:
    error = refused(**{field: value})
    assert error.param == field
    assert error.code == "invalid_value"
    assert limit in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", 1.5),
        ("max_tokens", "100"),
        ("n", [1]),
        ("seed", {}),
        ("logit_bias", []),
        ("stream", 1),
        ("stream_options", True),
        ("stop", 3),
        ("logprobs", 1),
        ("top_logprobs", True),
        ("parallel_tool_calls", "yes"),
        ("chat_template_kwargs", []),
        ("enable_thinking", "yes"),
        ("ignore_eos", 0),
        ("reasoning_effort", 3),
        ("thinking", "on"),
    ],
)
def test_a_wrong_type_is_refused_with_the_field(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.param == field
    assert error.code == "invalid_type"


@pytest.mark.parametrize(
    ("logit_bias", "param"),
    [
        ({"a": 1}, "logit_bias.a"),
        ({"-1": 1}, "logit_bias.-1"),
        ({"٣": 1}, "logit_bias.٣"),
        ({"99999999999": 1}, "logit_bias.99999999999"),
        ({"1": 101}, "logit_bias.1"),
        ({"1": None}, "logit_bias.1"),
        ({"1": "x"}, "logit_bias.1"),
    ],
)
def test_a_bad_logit_bias_is_refused(logit_bias: Any, param: str) -> None:
    assert refused(logit_bias=logit_bias).param == param


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, ()), ("END", ("END",)), (["a", "b", "a"], ("a", "b")), ([], ()), ([str(i) for i in range(20)],) * 2],
)
def test_stop(stop: Any, expected: Any) -> None:
    assert parse(stop=stop).limits.stop == tuple(expected)


@pytest.mark.parametrize(("stop", "param"), [("", "stop[0]"), (["a", ""], "stop[1]"), (["a", 3], "stop[1]")])
def test_a_bad_stop_is_refused(stop: Any, param: str) -> None:
    assert refused(stop=stop).param == param


def test_n_and_ignore_eos() -> None:
    assert parse(n=3).num_choices == 3
    assert parse(n=None).num_choices == 1
    assert parse(ignore_eos=True).limits.ignore_eos is True


def test_stream_options() -> None:
    assert parse(stream=True).include_usage is False
    asked = parse(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert (asked.stream, asked.include_usage) == (True, True)


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({}, Reasoning()),
        ({"reasoning_effort": "none"}, Reasoning("off")),
        ({"reasoning_effort": "high"}, Reasoning("on", "high")),
        ({"reasoning_effort": "xhigh"}, Reasoning("on", "xhigh")),
        ({"thinking": {"type": "disabled"}}, Reasoning("off")),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, Reasoning("on", budget_tokens=2048)),
        ({"enable_thinking": False}, Reasoning("off")),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, Reasoning("on")),
        ({"reasoning_effort": "low", "enable_thinking": False}, Reasoning("off", "low")),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}, Reasoning("off")),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, Reasoning("on")),
    ],
)
def test_reasoning(fields: dict[str, Any], reasoning: Reasoning) -> None:
    assert parse(**fields).reasoning == reasoning


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
    ],
)
def test_bad_reasoning_is_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_template_kwargs_are_handed_on_whole() -> None:
    kwargs = {"enable_thinking": False, "date": "today", "nested": {"a": [1]}}
    assert parse(chat_template_kwargs=kwargs).template_kwargs == kwargs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")
