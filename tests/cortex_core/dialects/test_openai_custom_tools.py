"""The text of a custom tool call, taken out of JSON arguments while they stream."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from cortex_core.dialects.openai_custom_tools import FreeformInput, freeform_arguments, freeform_text
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.event_streams import fragments, json_values, texts
from tests.counting import assert_linear, copied, peak_bytes


def read(pieces: list[str]) -> str:
    reader = FreeformInput()
    return "".join(map(reader.feed, pieces)) + reader.close()


@given(st.data())
def test_any_text_comes_back_under_any_cut(data: st.DataObject) -> None:
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"])))
    arguments = json.dumps({"input": text}, ensure_ascii=data.draw(st.booleans()))
    assert read(data.draw(fragments(arguments))) == text
    assert freeform_text(freeform_arguments(text)) == text


@given(st.data())
def test_whatever_comes_the_cut_changes_nothing(data: st.DataObject) -> None:
    value = data.draw(json_values | st.dictionaries(st.sampled_from(["input", "x"]), json_values))
    arguments = data.draw(st.sampled_from([json.dumps(value), json.dumps(value)[:-1], data.draw(texts)]))
    assert read(data.draw(fragments(arguments))) == freeform_text(arguments)


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    reader = FreeformInput()
    heard = [
        reader.feed(piece) for piece in ('{ "inp', 'ut" : "a', "b\\", 'n\\"c', "\\ud83d", "\\ude00", '"', "}", "x")
    ]
    assert heard == ["", "a", "b", '\n"c', "", "😀", "", "", ""]
    assert reader.close() == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", ""),
        ("{}", ""),
        ('{"patch": "x"}', "x"),
        ('{"a": 1, "input": "x"}', "x"),
        ('{"a": "1", "b": "2"}', '{"a": "1", "b": "2"}'),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'),
        ('"x"', "x"),
        ("[1]", "[1]"),
        ("no JSON", "no JSON"),
        ('{"input": "cut o', "cut o"),
        ('{"input": "a\\ud83d', "a"),
        ('{"input": "\\ud83d"}', "\ufffd"),
        ('{"input": "\\ud83dx"}', "\ufffdx"),
        ('{"input": "a\\qb"}', "a\\qb"),
        ('{"input": "line\nline"}', "line\nline"),
        (" " * 300 + '{"input": "x"}', "x"),
        ('{"input": "' + "y" * 1000 + '"}', "y" * 1000),
    ],
)
def test_arguments_that_a_model_may_write(arguments: str, text: str) -> None:
    assert freeform_text(arguments) == text
    assert read(list(arguments)) == text


# ---------------------------------------------------------------- what it costs


def test_arguments_that_never_begin_with_the_input_are_gathered_in_pieces() -> None:
    def fed(n: int) -> int:
        def work(text: Callable[[str], str]) -> None:
            reader = FreeformInput()
            for _ in range(n):
                assert reader.feed(text('{"other": ')) == ""

        return copied(work)

    assert_linear(fed, 400)
    reader = FreeformInput()
    assert [reader.feed(piece) for piece in (" " * 200, " " * 100, '{"input": "late"}')] == ["", "", ""]
    assert reader.close() == "late"


@pytest.mark.parametrize("unit", ["a", "\\n", "\\u00e4", "\\ud83d\\ude00"])
def test_a_long_text_takes_a_few_bytes_for_each_of_its_characters(unit: str) -> None:
    arguments = f'{{"input": "{unit * 200_000}"}}'
    assert len(freeform_text(arguments)) == 200_000
    assert peak_bytes(lambda: freeform_text(arguments)) < 12 * len(arguments) + 10_000
