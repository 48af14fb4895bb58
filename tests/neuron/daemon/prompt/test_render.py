from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.conversation import (
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

from tests.neuron.daemon.prompt.checkpoints import QWEN_ADDED, QWEN_SPECIAL, WEATHER, ask, byte_level_json, load, user
from tests.neuron.daemon.prompt.harness import CALLED, RESULT, assistant, states, system, text_of


def test_a_conversation_with_tools_becomes_the_templates_text(qwen: TextModel) -> None:
    text = text_of(qwen, turns=(system("S"), user("weather?"), CALLED, RESULT), tools=(WEATHER,))
    assert text.startswith("<|im_start|>system\nS\n\n# Tools")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<tool_response>\n14 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_string_and_single_block_render_alike_and_blocks_join_without_a_gap(qwen: TextModel) -> None:
    one = text_of(qwen, turns=(user("ab"),))
    assert text_of(qwen, turns=(Turn("user", (TextPart("a"), TextPart("b"))),)) == one


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


def test_the_reasoning_mode_reaches_the_template(qwen: TextModel) -> None:
    closed = "<think>\n\n</think>\n\n"
    assert not text_of(qwen).endswith(closed)
    assert text_of(qwen, reasoning=Reasoning(mode="off")).endswith(closed)
    assert text_of(qwen, reasoning=Reasoning(visible=False)).endswith(closed)  # N20
    assert not text_of(qwen, reasoning=Reasoning(mode="on", visible=False)).endswith(closed)
    explicit = {"enable_thinking": True}
    assert not text_of(qwen, reasoning=Reasoning(mode="off"), template_kwargs=explicit).endswith(closed)


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


def test_reasoning_of_the_past_is_the_templates_business(qwen: TextModel) -> None:
    turns = (user("a"), assistant(ThinkingPart("because"), "b"), user("c"))
    assert "because" not in text_of(qwen, turns=turns)
    assert "because" in text_of(qwen, turns=(*turns[:2], RESULT))


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
