from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.prompt.chat_template import ChatTemplate, TemplateRenderError, chatml, find_templates
from transformers.utils.chat_template_utils import render_jinja_template

from tests.neuron.daemon.prompt.checkpoints import TEMPLATES

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter <b>für</b> 'eine' Stadt",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie ist das Wetter?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "14 °C", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "14 degrees.", "reasoning_content": "short"},
    {"role": "user", "content": "Thanks & <bye>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize("name", ["qwen3", "coder_xml", "llama3", "mistral"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(name: str, tools: list[dict[str, Any]] | None) -> None:
    expected, _ = render_jinja_template(
        [CONVERSATION],
        tools=tools,
        chat_template=source(name),
        add_generation_prompt=True,
        enable_thinking=False,
        **SPECIAL,
    )
    template = ChatTemplate({"default": source(name)}, SPECIAL)
    assert template.render(CONVERSATION, tools=tools, variables={"enable_thinking": False}) == expected[0]


def test_capabilities_are_probed() -> None:
    probed = {name: ChatTemplate({"default": source(name)}, SPECIAL) for name in ("qwen3", "coder_xml", "mistral")}
    assert [template.renders_tools for template in probed.values()] == [True, True, True]
    assert [template.keeps_inner_system for template in probed.values()] == [True, True, False]
    assert [template.uses_xml_calls for template in probed.values()] == [False, True, False]
    plain = ChatTemplate({"default": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}, {})
    assert not plain.renders_tools


def write(path: Path, name: str, value: Any) -> None:
    (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_N8_precedence_of_template_files(tmp_path: Path) -> None:
    assert find_templates(tmp_path) == {}
    write(tmp_path, "tokenizer_config.json", {"chat_template": "from config"})
    assert find_templates(tmp_path) == {"default": "from config"}
    write(tmp_path, "chat_template.json", {"chat_template": "from json"})
    assert find_templates(tmp_path) == {"default": "from json"}
    write(tmp_path, "chat_template.jinja", "from jinja")
    assert find_templates(tmp_path) == {"default": "from jinja"}


def test_a_list_of_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "other", "template": "O"},
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T{{ tools[0].function.name }}"},
    ]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    template = ChatTemplate.load(tmp_path, {})
    assert template.render([{"role": "user", "content": ""}]) == "D"
    assert template.render([{"role": "user", "content": ""}], tools=TOOLS) == "Tget_weather"
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"no": 1}, {"template": "first with one"}]})
    assert ChatTemplate.load(tmp_path, {}).render([]) == "first with one"
    write(tmp_path, "tokenizer_config.json", "{broken")
    assert not ChatTemplate.load(tmp_path, {}).has_template


@pytest.mark.parametrize("value", ["0", "false", "NO", " off "])
def test_kill_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    write(tmp_path, "chat_template.jinja", "from jinja")
    assert ChatTemplate.load(tmp_path, {}).render([]) == "from jinja"
    monkeypatch.setenv("NEURON_USE_CHAT_TEMPLATE", value)
    template = ChatTemplate.load(tmp_path, {})
    assert (
        template.render([{"role": "user", "content": "hi"}])
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def render(text: str, **variables: Any) -> str:
    return ChatTemplate({"default": text}, SPECIAL).render([{"role": "user", "content": " Hi "}], variables=variables)


def test_python_methods_loop_controls_and_globals() -> None:
    assert render("{{ messages[0].content.strip().upper().startswith('HI') }}") == "True"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}kept{% endgeneration %}") == "kept"
    assert render("{{ {'ä': '<&>'} | tojson }}") == '{"ä": "<&>"}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ bos_token }}{{ x }}", x=3) == "<s>3"


def test_variables_do_not_replace_the_conversation() -> None:
    assert render("{{ messages[0].content }}{{ tools }}", messages=[], tools=[1]) == " Hi None"


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no such role') }}",
        "{{ messages.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_breaks_out(text: str) -> None:
    with pytest.raises(TemplateRenderError):
        render(text)


def test_a_template_that_does_not_compile_is_left_out() -> None:
    assert not ChatTemplate({"default": "{% if %}"}, {}).has_template


def test_plain_chatml_writes_calls_of_the_past() -> None:
    assert chatml(CONVERSATION[2:4]) == (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n14 °C<|im_end|>\n<|im_start|>assistant\n"
    )
