"""Calls written as XML: typed by the schema, and forgiven what models forget."""

from __future__ import annotations

import pytest
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.output.harness import XML, stream
from tests.neuron.daemon.prompt.checkpoints import load


def test_N17_an_xml_call_is_typed_by_the_schema(model: TextModel) -> None:
    answer = stream(model, XML)
    assert answer.calls == [("get_weather", '{"city": "Oslo", "days": 3}')]
    assert answer.reason == "tool_calls"
    assert answer.text == ""


def xml_call(**values: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=get_weather>\n{body}</function>\n</tool_call>"


def test_xml_values_of_every_type(qwen: TextModel) -> None:
    answer = stream(
        qwen,
        xml_call(city="12", days="07", scale="1.5", hourly="True", tags='["a", "b"]', where='{"lat": 1}', other="[1]"),
    )
    expected = {
        "city": "12",
        "days": "07",
        "scale": 1.5,
        "hourly": True,
        "tags": ["a", "b"],
        "where": {"lat": 1},
        "other": [1],
    }
    assert answer.arguments == [expected]


def test_xml_values_that_do_not_fit_stay_text(qwen: TextModel) -> None:
    answer = stream(qwen, xml_call(city="true", days="soon", hourly="maybe", tags="a, b", where="here"))
    assert answer.arguments == [{"city": "true", "days": "soon", "hourly": "maybe", "tags": "a, b", "where": "here"}]


def test_xml_text_keeps_its_lines_and_markup(qwen: TextModel) -> None:
    code = 'if a < b:\n    print("<parameter=x>")\n\nreturn </div>\n'
    assert stream(qwen, xml_call(city=code)).arguments == [{"city": code}]


def test_xml_forgotten_closing_tags(qwen: TextModel) -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n<parameter=days>\n2\n</parameter>\n</tool_call>"
    )
    assert stream(qwen, text).arguments == [{"city": "Oslo", "days": 2}]
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</function>\n</tool_call>"
    assert stream(qwen, text).arguments == [{"city": "Oslo"}]


def test_two_functions_in_one_block(model: TextModel) -> None:
    body = '{"name": "a", "arguments": {}}\n{"name": "b", "arguments": {"x": 1}}'
    assert stream(model, f"<tool_call>{body}</tool_call>").calls == [("a", "{}"), ("b", '{"x": 1}')]
    body = "<function=a></function>\n<function=b><parameter=x>1</parameter></function>"
    assert stream(model, f"<tool_call>{body}</tool_call>").calls == [("a", "{}"), ("b", '{"x": 1}')]


def test_an_xml_function_without_its_marker(tmp_path_factory: pytest.TempPathFactory, model: TextModel) -> None:
    folder = tmp_path_factory.mktemp("coder")
    coder = load(folder, template="coder_xml", tokenizer_json=model.tokenizer_json)
    bare = XML.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    for step in (1, 3, 1000):
        answer = stream(coder, f"Well.\n{bare}\n</tool_call>\n{XML}\n{bare}\nDone.", sizes=(step,))
        assert answer.arguments == [{"city": "Oslo", "days": 3}] * 3
        assert answer.text == "Well.Done."
        assert stream(coder, "a <function b </function>", sizes=(step,)).text == "a <function b </function>"
        assert stream(coder, "a <function=", sizes=(step,)).text == "a <function="
    assert stream(model, bare).text == bare
