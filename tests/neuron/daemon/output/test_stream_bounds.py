"""What an answer costs while it comes, whatever it is: in all, no more than in proportion to its length."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
from cortex_core.conversation import Limits, Reasoning, Request
from neuron.daemon.grammar.schema_types import ArgumentTypes, StepBudget
from neuron.daemon.output.detokenizer import Detokenizer
from neuron.daemon.output.event_stream import EventStream
from neuron.daemon.output.stop_strings import StopMatcher, StopStringFilter, StopStrings
from neuron.daemon.output.tool_calls import ToolCallStream
from neuron.daemon.output.tool_formats import CallParser, EndCall, QwenJsonParser, QwenXmlParser
from neuron.daemon.text.held_text import HeldText
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt
from neuron.daemon.text.token_table import TokenTable

from tests.counting import assert_linear, copied, peak_bytes, steps
from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask

THINK = MarkerPair("<think>", "</think>")
CALL = MarkerPair("<tool_call>", "</tool_call>")


def words(*values: str) -> tuple[TokenTable, list[int]]:
    """A table whose tokens are these words, and their ids."""
    return TokenTable([value.encode() for value in values], frozenset(), strips_leading_space=False), list(
        range(len(values))
    )


def counted(work: Callable[[], object]) -> int:
    """Characters that are copied and searched of what the detokeniser yields."""
    add = Detokenizer.add

    def measured(text: Callable[[str], str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Detokenizer, "add", lambda self, token: text(add(self, token)))
            work()

    return copied(measured)


def stream_of(tokens: TokenTable, request: Request, thought: MarkerPair | None = None, **prompt: Any) -> EventStream:
    return EventStream(tokens, thought, CALL, request, Prompt(token_ids=[0], text="", **prompt))


# ---------------------------------------------------------------- H2: stop strings


def test_H2_memory_of_stop_strings_is_linear_in_their_length() -> None:
    assert_linear(lambda n: peak_bytes(lambda: StopStrings(("ab" * n,))), 2000)
    assert_linear(lambda n: peak_bytes(lambda: StopStrings(tuple(f"{i:03}" + "x" * 50 for i in range(n)))), 40)
    assert StopStrings(("ab" * 50_000,)).num_states == 100_001


def test_H2_an_automaton_is_built_in_work_linear_in_the_strings() -> None:
    def periodic(n: int) -> int:
        return steps(lambda: StopStrings(("a" * n + "b", "a" * n, "aab" * (n // 3))))

    assert_linear(periodic, 300)


def test_H2_each_character_is_looked_at_once_however_much_is_held() -> None:
    """A text that is for ever about to match: one more `a` than the string has before its `b`."""

    def almost(n: int) -> int:
        stream = StopStringFilter(StopStrings(("a" * n + "b",)))
        return steps(lambda: [stream.feed("a") for _ in range(2 * n)])

    assert_linear(almost, 300)


def test_H2_choices_share_what_is_built_for_a_request() -> None:
    tokens, _ = words("a")
    request = ask(limits=Limits(stop=("x" * 1000,)))
    first = stream_of(tokens, request)
    tracemalloc.start()
    try:
        more = [stream_of(tokens, request) for _ in range(100)]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held / 100 < 20_000
    assert first._stops is not None and more[0]._stops is not None
    assert first._stops._stops is more[0]._stops._stops


def test_a_match_of_several_strings_is_the_one_that_ends_first_and_starts_first() -> None:
    matcher = StopMatcher(StopStrings(("she", "he", "hers", "xyz")))
    assert matcher.find("us") is None and matcher.num_held == 1
    assert matcher.find("hers") == (2, "she")
    assert matcher.find("ers hers") == (6, "he")


# ---------------------------------------------------------------- text that waits


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("blanks before a call that never comes", lambda n: repeat(0, n)),
        ("the beginning of a stop string, again and again", lambda n: repeat(1, n)),
        ("half of a marker", lambda n: repeat(2, n)),
        ("both in turn", lambda n: (i % 3 for i in range(n))),
    ],
)
def test_what_is_held_back_is_copied_once(name: str, pieces: Callable[[int], Any]) -> None:
    tokens, _ = words("    ", "aaaa", "<tool_ca", "x")
    request = ask(tools=(WEATHER,), limits=Limits(stop=("a" * 1000 + "b",)))

    def feed(n: int) -> None:
        stream = stream_of(tokens, request)
        for token in pieces(n):
            stream.feed([token])

    assert_linear(lambda n: counted(lambda: feed(n)), 400)
    assert_linear(lambda n: steps(lambda: feed(n)), 400)


def test_held_text_hands_out_each_character_once_in_order() -> None:
    held = HeldText()
    text = "".join(chr(ord("a") + i % 26) + " " * (i % 4) for i in range(300))
    taken = []
    for at in range(0, len(text), 7):
        held.append(text[at : at + 7])
        assert held.num_blanks == len(text[: at + 7]) - len(text[: at + 7].rstrip()) or held.num_blanks == len(held)
        taken.append(held.take((at // 7) % 9))
    taken.append(held.take_all())
    assert "".join(taken) == text
    assert len(held) == 0 and held.take_all() == "" and held.take(3) == ""


def test_a_thought_of_blanks_costs_no_more_than_its_length() -> None:
    tokens, _ = words("  \n ", "x")
    request = ask(reasoning=Reasoning(mode="on"))

    def blanks(n: int) -> None:
        stream = stream_of(tokens, request, THINK, reasoning="open")
        stream.feed([1])
        for _ in range(n):
            stream.feed([0])
        (event,) = stream.feed([1])
        assert event.text == "  \n " * n + "x"  # type: ignore[union-attr]

    assert_linear(lambda n: counted(lambda: blanks(n)), 400)
    assert_linear(lambda n: steps(lambda: blanks(n)), 400)


# ---------------------------------------------------------------- tool calls


def xml_parser(properties: dict[str, Any] | None = None) -> QwenXmlParser:
    types = ArgumentTypes({"properties": properties or {}}, StepBudget())
    return QwenXmlParser(lambda name: True, lambda name: types)


def json_parser() -> QwenJsonParser:
    return QwenJsonParser(lambda name: True)


CALLS: dict[str, tuple[Callable[[], CallParser], str, Callable[[int], list[str]]]] = {
    "a file as an argument": (xml_parser, "<function=f><parameter=a>", lambda n: ["abc "] * n),
    "line breaks and angles": (xml_parser, "<function=f><parameter=a>", lambda n: ["\n</par", "<"] * n),
    "stray text between arguments": (xml_parser, "<function=f>", lambda n: ["stray < "] * n),
    "angles between arguments": (xml_parser, "<function=f>", lambda n: ["<" * n]),
    "blanks between arguments": (xml_parser, "<function=f>", lambda n: ["   "] * n),
    "many arguments": (xml_parser, "<function=f>", lambda n: [f"<parameter=p{i}>1</parameter>" for i in range(n)]),
    "many calls": (xml_parser, "", lambda n: ["<function=f>", "</function>"] * n),
    "a string as an argument": (json_parser, '{"name": "f", "arguments": {"a": "', lambda n: ["abc "] * n),
    "escapes": (json_parser, '{"name": "f", "arguments": {"a": "', lambda n: ["\\", "n"] * n),
    "bare line breaks": (json_parser, '{"name": "f", "arguments": {"a": "', lambda n: ["\n"] * n),
    "open brackets": (json_parser, '{"name": "f", "arguments": {"a": ', lambda n: ["["] * n),
    "arguments before the name": (json_parser, '{"arguments": {"a": "', lambda n: ["abc "] * n),
    "another value before the name": (json_parser, '{"x": "', lambda n: ["abc "] * n),
    "nothing but brackets": (json_parser, "", lambda n: ["[", "]", ","] * n),
    "short keys": (json_parser, '{"name": "f", ', lambda n: ['"k": 1, '] * n),
    "calls in a row": (json_parser, "", lambda n: ['{"name": "f", ', '"arguments": {}}'] * n),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_costs_no_more_than_its_length(name: str) -> None:
    make, opening, pieces = CALLS[name]

    def fed(n: int) -> tuple[int, int]:
        def work(text: Callable[[str], str]) -> None:
            parser = make()
            parser.feed(text(opening))
            for piece in pieces(n):
                parser.feed(text(piece))

        return copied(work), steps(lambda: work(str))

    assert_linear(lambda n: fed(n)[0], 300)
    assert_linear(lambda n: fed(n)[1], 300)


def test_blanks_before_a_call_are_gathered_in_pieces() -> None:
    def blanks(n: int) -> int:
        def work(text: Callable[[str], str]) -> None:
            calls = ToolCallStream(ask(tools=(WEATHER,)), 0, "id")
            calls.open("<tool_call>")
            for _ in range(n):
                calls.feed(text("  \n "))

        return copied(work)

    assert_linear(blanks, 300)


def test_many_forgotten_ends_of_arguments_are_no_recursion() -> None:
    parser = xml_parser({f"p{n}": {"type": "string"} for n in range(3000)})
    value = "".join(f"\n<parameter=p{n}>{n}" for n in range(1, 3000))
    actions = parser.feed(f"<function=f><parameter=p0>0{value}</parameter></function>")
    assert len(actions) == 3003 and isinstance(actions[-1], EndCall)


def test_arguments_of_any_depth_are_a_call_or_text() -> None:
    for depth in range(10, 1400, 15):
        for value in ("[" * depth + "]" * depth, '"' + "[" * depth + "]" * depth + '"'):
            for cut in (0, depth // 2):
                parser = json_parser()
                parser.feed(f'{{"name": "f", "arguments": {value[: len(value) - cut]}')
                parser.feed("}")
                parser.close(truncated=False)
            xml = xml_parser()
            xml.feed(f"<function=f><parameter=a>{value}</parameter></function>")
