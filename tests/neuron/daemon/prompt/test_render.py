from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cortex_core.conversation import (
    ImagePart,
    RawPrompt,
    Reasoning,
    Request,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolResultPart,
    Turn,
)
from cortex_core.errors import ApiError
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.prompt.model import TextModel
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.neuron.daemon.prompt.checkpoints import QWEN_ADDED, QWEN_SPECIAL, WEATHER, ask, byte_level_json, load, user


def text_of(model: TextModel, **fields: Any) -> str:
    return model.render(ask(**fields))[0].text


def system(text: str) -> Turn:
    return Turn("system", (TextPart(text),))


def assistant(*parts: Any) -> Turn:
    return Turn("assistant", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


CALLED = assistant(ToolCallPart("call_1", "get_weather", '{"city": "Oslo"}'))
RESULT = Turn("tool", (ToolResultPart("call_1", (TextPart("14 °C"),)),))


def test_a_conversation_with_tools_becomes_the_templates_text(qwen: TextModel) -> None:
    text = text_of(qwen, turns=(system("S"), user("weather?"), CALLED, RESULT), tools=(WEATHER,))
    assert text.startswith("<|im_start|>system\nS\n\n# Tools")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<tool_response>\n14 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_ids_are_those_of_the_text_with_special_tokens(qwen: TextModel) -> None:
    prompt = qwen.render(ask("hi"))[0]
    assert prompt.token_ids == qwen.tokenizer.encode(prompt.text)
    assert prompt.token_ids[0] == qwen.tokenizer.token_id("<|im_start|>")
    assert prompt.is_chat
    assert qwen.count_tokens(ask("hi")) == prompt.num_tokens


def test_string_and_single_block_render_alike_and_blocks_join_without_a_gap(qwen: TextModel) -> None:
    one = text_of(qwen, turns=(user("ab"),))
    assert text_of(qwen, turns=(Turn("user", (TextPart("a"), TextPart("b"))),)) == one


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


# ---------------------------------------------------------------- templates that want other conversations


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


def test_tools_never_vanish_silently(tmp_path: Path) -> None:
    model = load(tmp_path, template=None)
    with pytest.raises(ApiError) as caught:
        model.render(ask(tools=(WEATHER,)))
    assert caught.value.code == "template_render_failed"
    assert model.render(ask(tools=(WEATHER,), tool_choice=ToolChoice("none")))


def test_tool_choice_decides_which_tools_are_shown(qwen: TextModel) -> None:
    other = type(WEATHER)("other_tool", None, None)
    both = (WEATHER, other)
    assert "# Tools" not in text_of(qwen, tools=both, tool_choice=ToolChoice("none"))
    text = text_of(qwen, tools=both, tool_choice=ToolChoice("auto", allowed=("other_tool",)))
    assert "other_tool" in text
    assert "get_weather" not in text


# ---------------------------------------------------------------- reasoning


def test_the_reasoning_mode_reaches_the_template(qwen: TextModel) -> None:
    closed = "<think>\n\n</think>\n\n"
    assert not text_of(qwen).endswith(closed)
    assert text_of(qwen, reasoning=Reasoning(mode="off")).endswith(closed)
    assert text_of(qwen, reasoning=Reasoning(visible=False)).endswith(closed)  # N20
    assert not text_of(qwen, reasoning=Reasoning(mode="on", visible=False)).endswith(closed)
    explicit = {"enable_thinking": True}
    assert not text_of(qwen, reasoning=Reasoning(mode="off"), template_kwargs=explicit).endswith(closed)


def states(model: TextModel, **fields: Any) -> str:
    return model.render(ask(**fields))[0].reasoning


def test_N19_the_prompt_says_whether_a_thought_is_open(qwen: TextModel, tmp_path: Path) -> None:
    assert states(qwen) == "possible"
    assert states(qwen, reasoning=Reasoning(mode="off")) == "none"
    assert states(qwen, text="what does <think> mean? <think>") == "possible"
    load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}[A]<think>\n")
    opener = TextModel.load(tmp_path)
    assert states(opener) == "open"
    assert opener.render(ask())[0].starts_in_reasoning
    prompt = opener.render(ask("q", reasoning=Reasoning(mode="off")))[0]
    assert prompt.text == "q[A]<think>\n\n</think>\n\n"
    assert prompt.reasoning == "none"


def test_a_model_without_markers_does_not_reason(tmp_path: Path) -> None:
    model = load(tmp_path, template="llama3", tokenizer_json=byte_level_json(()))
    assert model.reasoning is None
    assert not model.can_reason
    assert states(model) == "none"


def test_reasoning_of_the_past_is_the_templates_business(qwen: TextModel) -> None:
    turns = (user("a"), assistant(ThinkingPart("because"), "b"), user("c"))
    assert "because" not in text_of(qwen, turns=turns)
    assert "because" in text_of(qwen, turns=(*turns[:2], RESULT))


# ---------------------------------------------------------------- continuing an answer


@pytest.mark.parametrize("template", ["qwen3", "llama3", "mistral", "coder_xml"])
def test_an_answer_begun_by_the_client_is_continued(tmp_path: Path, template: str) -> None:
    model = load(tmp_path, template=template)
    text = text_of(model, turns=(user("hi"), assistant("Well, ")), continue_final_turn=True)
    assert text.endswith("Well, ")
    assert text.count("Well, ") == 1
    plain = text_of(model, turns=(user("hi"), assistant("Well, ")))
    assert not plain.endswith("Well, ")


def test_a_begun_thought_is_continued_as_one(qwen: TextModel) -> None:
    fields = {"continue_final_turn": True, "turns": (user("hi"), assistant("<think>\nso"))}
    assert states(qwen, **fields) == "open"
    fields["turns"] = (user("hi"), assistant("<think>\nso\n</think>\nWell"))
    assert states(qwen, **fields) == "none"


def test_nothing_begun_is_nothing_to_continue(qwen: TextModel) -> None:
    turns = (user("hi"), Turn("assistant"))
    assert text_of(qwen, turns=turns, continue_final_turn=True) == text_of(qwen, turns=turns[:1])


# ---------------------------------------------------------------- raw prompts


def test_a_completion_has_no_template(qwen: TextModel) -> None:
    prompts = qwen.render(Request(model="tiny", prompts=(RawPrompt(text="12 + 30"), RawPrompt(token_ids=(5, 6)))))
    assert prompts[0].text == "12 + 30"
    assert prompts[0].token_ids == qwen.tokenizer.encode("12 + 30")
    assert not prompts[0].is_chat
    assert prompts[1].token_ids == [5, 6]
    assert prompts[1].text == qwen.tokenizer.decode([5, 6])


def test_bos_is_written_once(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    start = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    model = load(
        tmp_path,
        template="llama3",
        tokenizer_json=backend.to_str(),
        tokenizer_config={"bos_token": "<|endoftext|>"},
    )
    assert model.render(ask())[0].token_ids.count(start) == 1
    for text in ("hello", "<|endoftext|>hello"):
        ids = model.render(Request(model="tiny", prompts=(RawPrompt(text=text),)))[0].token_ids
        assert ids[0] == start
        assert ids.count(start) == 1
    assert model.render(Request(model="tiny", prompts=(RawPrompt(token_ids=(7,)),)))[0].token_ids == [7]
    assert model.render(Request(model="tiny", prompts=(RawPrompt(text=""),)))[0].token_ids == [start]


def test_an_empty_prompt_starts_a_document(qwen: TextModel) -> None:
    ids = qwen.render(Request(model="tiny", prompts=(RawPrompt(text=""),)))[0].token_ids
    assert ids == [qwen.tokenizer.token_id("<|endoftext|>")]


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_that_do_not_exist_are_refused(qwen: TextModel, token_id: int) -> None:
    request = Request(model="tiny", prompts=(RawPrompt(text="a"), RawPrompt(token_ids=(1, token_id))))
    with pytest.raises(ApiError) as caught:
        qwen.render(request)
    assert caught.value.param == "prompt[1]"


def test_fill_in_the_middle(qwen: TextModel, tmp_path: Path) -> None:
    request = Request(model="tiny", prompts=(RawPrompt(text="def f(", suffix="return x"),))
    with pytest.raises(ApiError) as caught:
        qwen.render(request)
    assert caught.value.param == "suffix"
    markers = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    coder = load(tmp_path / "a", tokenizer_json=byte_level_json(QWEN_ADDED, (*QWEN_SPECIAL, *markers)))
    ids = coder.render(request)[0].token_ids
    expected = "<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>"
    assert coder.tokenizer.decode(ids) == expected
    mistral = load(tmp_path / "b", tokenizer_json=byte_level_json(("[PREFIX]", "[SUFFIX]")))
    assert mistral.tokenizer.decode(mistral.render(request)[0].token_ids) == "[SUFFIX]return x[PREFIX]def f("


def test_a_conversation_of_nothing_is_refused(qwen: TextModel) -> None:
    with pytest.raises(ApiError) as caught:
        qwen.render(ask(turns=(Turn("tool"),)))
    assert caught.value.param == "messages"


def test_what_cannot_fit_is_refused_before_it_is_tokenised(qwen: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ask("hello " * 100)
    assert qwen.render(request, max_model_len=1000) == qwen.render(request)
    monkeypatch.setattr(qwen.tokenizer, "encode", lambda text: pytest.fail("tokenised"))
    huge = "x" * (1000 * qwen.tokenizer.longest_token_bytes * 2)
    for request in (ask(huge), Request(model="tiny", prompts=(RawPrompt(text=huge),))):
        with pytest.raises(ApiError) as caught:
            qwen.render(request, max_model_len=1000)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.extras["prompt_len"] > 1000


# ---------------------------------------------------------------- anything at all

WORDS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=12)
PARTS = st.one_of(
    WORDS.map(TextPart),
    WORDS.map(ThinkingPart),
    st.builds(ToolCallPart, WORDS, WORDS, st.sampled_from(['{"a": 1}', "{", ""])),
)
RESULTS = st.builds(ToolResultPart, WORDS, st.lists(WORDS.map(TextPart), max_size=2).map(tuple))
TURNS = st.lists(
    st.one_of(
        st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), st.lists(PARTS, max_size=3).map(tuple)),
        st.builds(Turn, st.just("tool"), st.lists(RESULTS, min_size=1, max_size=3).map(tuple)),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@settings(max_examples=150)
@given(TURNS, st.booleans(), st.booleans())
def test_any_conversation_renders(qwen: TextModel, turns: tuple[Turn, ...], goes_on: bool, has_tools: bool) -> None:
    tools = (WEATHER,) if has_tools else ()
    request = ask(turns=(user("x"), *turns), continue_final_turn=goes_on, tools=tools)
    assert qwen.render(request)[0].num_tokens > 0


@settings(max_examples=60)
@given(TURNS)
def test_any_conversation_renders_for_a_strict_template(
    tmp_path_factory: pytest.TempPathFactory, turns: tuple[Turn, ...]
) -> None:
    global _strict
    if _strict is None:
        _strict = load(tmp_path_factory.mktemp("strict"), template="mistral")
    assert _strict.render(ask(turns=turns))[0].num_tokens > 0


_strict: TextModel | None = None
