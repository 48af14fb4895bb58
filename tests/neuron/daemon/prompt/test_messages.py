"""Conversations as templates take them, some of which take fewer than others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cortex_core.conversation import ImagePart, TextPart, ToolCallPart, ToolResultPart, Turn
from cortex_core.errors import ApiError
from neuron.daemon.prompt.messages import variants
from neuron.daemon.prompt.model import TextModel

from tests.counting import assert_linear, copied, peak_bytes, steps
from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask, load, user
from tests.neuron.daemon.prompt.harness import CALLED, RESULT, assistant, system, text_of


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"', "not json", "[1, 2]", '"text"', ""])
@pytest.mark.parametrize("template", ["qwen3", "coder_xml", "mistral", "llama3"])
def test_N18_malformed_arguments_of_the_past_do_not_refuse_a_request(
    tmp_path: Path, template: str, arguments: str
) -> None:
    model = load(tmp_path, template=template)
    calls = assistant(ToolCallPart("call_1", "get_weather", arguments))
    text = text_of(model, turns=(user("w?"), calls, RESULT, user("so?")), tools=(WEATHER,))
    assert "get_weather" in text.rsplit("w?", 1)[1]
    assert arguments.split('"')[-1] in text


def test_F15_an_image_is_refused_by_name(qwen: TextModel) -> None:
    shown = Turn("user", (TextPart("what is it?"), ImagePart(url="https://example.org/x.png")))
    in_result = Turn("tool", (ToolResultPart("call_1", (ImagePart(data="AAAA", media_type="image/png"),)),))
    for turn in (shown, in_result):
        with pytest.raises(ApiError) as caught:
            qwen.render(ask(turns=(turn,)))
        assert caught.value.code == "vision_unsupported"
        assert caught.value.status == 400
        assert caught.value.extras["model_id"] == "tiny"


def test_a_system_message_in_the_middle_stays_where_it_is(qwen: TextModel, tmp_path: Path) -> None:
    turns = (system("HEAD"), user("one"), system("INNER"), user("two"))
    assert "one<|im_end|>\n<|im_start|>system\nINNER<|im_end|>\n<|im_start|>user\ntwo" in text_of(qwen, turns=turns)
    mistral = load(tmp_path, template="mistral")
    text = text_of(mistral, turns=turns)
    assert text == "[INST] HEAD\n\none\n\nINNER\n\ntwo[/INST]"


def test_the_head_does_not_change_when_a_later_system_message_comes(tmp_path: Path) -> None:
    model = load(tmp_path, template="mistral")
    first = text_of(model, turns=(system("HEAD"), user("one")))
    later = text_of(model, turns=(system("HEAD"), user("one"), assistant("a"), user("two"), system("INNER")))
    assert later.startswith(first)
    assert later.endswith("[INST] two\n\nINNER[/INST]")


def test_roles_that_do_not_alternate_are_merged_where_the_template_minds(tmp_path: Path) -> None:
    model = load(tmp_path, template="mistral", tokenizer_config={"eos_token": "</s>"})
    turns = (user("a"), user("b"), assistant("c"), assistant("d"), user("e"))
    assert text_of(model, turns=turns) == "[INST] a\n\nb[/INST] c\n\nd</s>[INST] e[/INST]"
    assert text_of(model, turns=(assistant("c"), user("e"))) == "[INST] [/INST] c</s>[INST] e[/INST]"


def test_call_ids_become_what_the_template_accepts_and_still_match(tmp_path: Path) -> None:
    model = load(tmp_path, template="mistral")
    text = text_of(model, turns=(user("w?"), CALLED, RESULT), tools=(WEATHER,))
    call_id = text.split('"id": "')[1].split('"')[0]
    assert len(call_id) == 9
    assert f'"call_id": "{call_id}"' in text


NO_SYSTEM = """{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"""


def test_a_template_without_a_system_role(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(NO_SYSTEM)
    assert text_of(TextModel.load(tmp_path), turns=(system("S"), user("u"))) == "<user>S\n\nu<model>"


def test_a_refused_conversation_falls_back_only_without_tools(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools[0].function.name }}{% endif %}"
        "{% if 'bad' in messages[0].content %}{{ raise_exception('I refuse') }}{% endif %}ok"
    )
    model = TextModel.load(tmp_path)
    assert text_of(model, text="good", tools=(WEATHER,)) == "get_weatherok"
    assert text_of(model, text="bad") == "<|im_start|>user\nbad<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ApiError) as caught:
        model.render(ask("bad", tools=(WEATHER,)))
    assert caught.value.code == "template_render_failed"
    assert caught.value.status == 400
    assert "I refuse" in caught.value.message


def test_turns_of_one_role_are_merged_in_work_linear_in_them() -> None:
    def merged(n: int) -> int:
        def work(text: Any) -> None:
            messages = [{"role": "user", "content": text("abcdefgh")} for _ in range(n)]
            call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
            messages += [
                {"role": "assistant", "content": text("x"), "reasoning_content": text("y"), "tool_calls": [call]}
                for _ in range(n)
            ]
            for _ in variants(messages, keeps_inner_system=True):
                continue

        return copied(work) + steps(lambda: work(str)) + peak_bytes(lambda: work(str))

    assert_linear(merged, 300)
