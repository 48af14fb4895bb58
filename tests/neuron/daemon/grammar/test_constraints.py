from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llguidance
import pytest
from cortex_core.conversation import Reasoning, Request, ResponseFormat, ToolChoice, ToolDefinition
from cortex_core.errors import ApiError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.output.harness import stream
from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask, byte_level_json, load, sentencepiece_model

TIME = ToolDefinition(
    "get_time",
    None,
    {
        "type": "object",
        "properties": {"zone": {"$ref": "#/$defs/zone"}},
        "required": ["zone"],
        "$defs": {"zone": {"enum": ["utc", "cet"]}},
    },
)
OFF = Reasoning(mode="off")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


class Grammar:
    """The grammar of a request, and whether llguidance takes a text with the model's own tokenizer."""

    def __init__(self, model: TextModel, request: Request) -> None:
        (choice,) = model.resolve(request, model.render(request), max_model_len=100_000)
        assert choice.grammar is not None
        self.text = choice.grammar.grammar
        self.tokenizer = llguidance.LLTokenizer(model.tokenizer_json)
        self.model = model
        assert llguidance.LLMatcher.validate_grammar(self.text, self.tokenizer) == ""

    def accepts(self, text: str) -> bool:
        matcher = llguidance.LLMatcher(self.tokenizer, self.text, log_level=0)
        ids = self.model.tokenizer.encode(text)
        taken = matcher.try_consume_tokens(ids)
        assert not matcher.is_error(), matcher.get_error()
        return bool(taken == len(ids) and matcher.is_accepting())


def json_schema(schema: Any, **fields: Any) -> Request:
    fields.setdefault("reasoning", OFF)
    return ask(response_format=ResponseFormat("json_schema", schema), **fields)


def test_without_a_demand_there_is_no_grammar(qwen: TextModel) -> None:
    for request in (ask(), ask(tools=(WEATHER,)), ask(tools=(WEATHER,), tool_choice=ToolChoice("none"))):
        assert qwen.resolve(request, qwen.render(request), max_model_len=1000)[0].grammar is None


# ---------------------------------------------------------------- response_format


def test_json_object(qwen: TextModel) -> None:
    grammar = Grammar(qwen, ask(response_format=ResponseFormat("json_object"), reasoning=OFF))
    assert grammar.accepts('{"a": [1, {"b": null}], "c": "x"}')
    assert grammar.accepts("{}")
    assert not grammar.accepts("[1]")
    assert not grammar.accepts("Sure: {}")
    assert not grammar.accepts('{"a": 1} ok')


def test_json_schema_in_usual_layouts(qwen: TextModel) -> None:
    grammar = Grammar(qwen, json_schema(PERSON))
    for indent in (None, 2, 4):
        assert grammar.accepts(json.dumps({"name": "Ada", "age": 36}, indent=indent))
    assert grammar.accepts('{"name":"Ada","age":36}')
    assert not grammar.accepts('{"name": "Ada"}')
    assert not grammar.accepts('{"name": "Ada", "age": "36"}')


def test_white_space_is_limited_so_that_small_models_end(qwen: TextModel) -> None:
    grammar = Grammar(qwen, json_schema(PERSON))
    assert not grammar.accepts('{"name":   "Ada", "age": 36}')
    assert not grammar.accepts('{"name": "Ada", "age": 36\n\n}')
    assert not grammar.accepts(' {"name": "Ada", "age": 36}')


def test_closed_objects_take_no_properties_of_their_own(qwen: TextModel) -> None:
    assert not Grammar(qwen, json_schema(PERSON)).accepts('{"name": "Ada", "age": 36, "x": 1}')
    open_person = {**PERSON, "additionalProperties": {"type": "integer"}}
    assert Grammar(qwen, json_schema(open_person)).accepts('{"name": "Ada", "age": 36, "x": 1}')


def test_the_schema_language(qwen: TextModel) -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
            }
        },
        "type": "object",
        "properties": {
            "list": {"$ref": "#/$defs/node"},
            "kind": {"const": "k"},
            "color": {"enum": ["red", 7, None]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
            "day": {"type": "string", "format": "date"},
            "some": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["list", "kind", "color", "code", "day", "some"],
    }
    good: dict[str, Any] = {
        "list": {"v": 1, "next": {"v": 2, "next": None}},
        "kind": "k",
        "color": 7,
        "code": "AB12",
        "day": "2026-11-05",
        "some": [True],
    }
    grammar = Grammar(qwen, json_schema(schema))
    Draft202012Validator(schema).validate(good)
    assert grammar.accepts(json.dumps(good))
    for change in (
        {"kind": "j"},
        {"color": "blue"},
        {"code": "ab"},
        {"day": "today"},
        {"some": []},
        {"list": {"v": 1}},
    ):
        assert not grammar.accepts(json.dumps(good | change))


def with_a(schema: Any, **more: Any) -> dict[str, Any]:
    """An object whose one property `a` has to satisfy `schema`."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


@pytest.mark.parametrize(
    ("schema", "example"),
    [
        (with_a({"type": "string", "pattern": "(?=x)y"}), {"a": "q"}),
        (with_a({"type": "string", "format": "made-up"}), {"a": "q"}),
        (with_a({"if": {"type": "string"}, "then": {"minLength": 2}}), {"a": "qq"}),
        (with_a({"type": "array", "uniqueItems": True, "contains": {}}), {"a": [1]}),
        (with_a({"$ref": "https://example.org/s.json"}), {"a": [1]}),
        (with_a({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}), {"a": "abc"}),
        ({"type": "object", "patternProperties": {"^a": {}, "^ab": {"type": "integer"}}}, {"ab": 1}),
        (with_a({}, anyOf=[{"required": ["a"]}, {"required": ["b"]}]), {"a": 1}),
        (with_a({"type": "integer", "default": 3, **{"$schema": "http://json-schema.org/draft-07/schema#"}}), {"a": 1}),
        (with_a({"items": [{"type": "string"}]}), {"a": ["x"]}),
        (True, {"a": 1}),
        (None, {"a": 1}),
    ],
)
def test_10_36_a_valid_schema_is_loosened_never_refused(qwen: TextModel, schema: Any, example: Any) -> None:
    grammar = Grammar(qwen, json_schema(schema))
    assert grammar.accepts(json.dumps(example))
    assert not grammar.accepts("no JSON")
    assert not grammar.accepts(json.dumps(example)[:-1])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": 3},
        {"$ref": "#/$defs/x"},
        {"type": "string", "pattern": "("},
        {"enum": []},
        {"type": "integer", "minimum": 3, "maximum": 1},
        False,
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
    ],
)
def test_a_bad_schema_is_a_400_that_names_the_field(qwen: TextModel, schema: Any) -> None:
    for request, param in (
        (json_schema(schema), "response_format.json_schema.schema"),
        (
            ask(
                tools=(WEATHER, ToolDefinition("bad", None, with_a(schema))),
                tool_choice=ToolChoice("required"),
            ),
            "tools[1].function.parameters",
        ),
    ):
        for _ in range(2):  # the second answer comes from the cache
            with pytest.raises(ApiError) as caught:
                qwen.resolve(request, qwen.render(request), max_model_len=1000)
            assert caught.value.status == 400
            assert caught.value.param == param
            assert caught.value.message.startswith("Invalid schema: ")


def test_a_hostile_schema_ends_in_a_grammar_or_a_400(qwen: TextModel) -> None:
    """The compiler's limits are on: without them this runs into the suite's timeout."""
    nested: Any = {"type": "string"}
    for _ in range(60):
        nested = {"anyOf": [nested, nested]} if len(json.dumps(nested)) < 100_000 else {"items": nested}
    hostile = [
        {"type": "string", "pattern": "^(a{1,200}b{1,200}){1,200}$"},
        {"type": "string", "pattern": "^" + "(a|b|ab)*" * 200 + "$"},
        {"type": "string", "minLength": 10**6, "maxLength": 10**9},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"^x{i}+$"} for i in range(500)}},
        nested,
    ]
    for schema in hostile:
        request = json_schema(schema)
        try:
            qwen.resolve(request, qwen.render(request), max_model_len=1000)
        except ApiError as exc:
            assert exc.status == 400


SCHEMAS = st.recursive(
    st.sampled_from(
        [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1]}, {}]
    ),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": sorted(p)}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_whatever_the_grammar_lets_through_validates(qwen: TextModel, schema: dict[str, Any], seed: int) -> None:
    """Walk the masks at random, as a model without a clue would, and validate what comes out."""
    import random

    grammar = Grammar(qwen, json_schema(schema))
    rng = random.Random(seed)
    matcher = llguidance.LLMatcher(grammar.tokenizer, grammar.text, log_level=0)
    ids: list[int] = []
    ends = set(qwen.defaults.stop_token_ids)
    while not matcher.is_stopped() and len(ids) < 200:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(qwen.tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1 and i not in ends]
        if not allowed or (matcher.is_accepting() and rng.random() < 0.5):
            break
        closing = [i for i in allowed if qwen.tokenizer.token_bytes(i) in (b'"', b"}", b"]", b",", b":")]
        token = rng.choice(closing if closing and rng.random() < 0.6 else allowed)
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    if matcher.is_accepting():
        Draft202012Validator(schema).validate(json.loads(qwen.tokenizer.decode(ids)))


# ---------------------------------------------------------------- forced tool calls

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "utc"}}\n</tool_call>'


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return load(tmp_path_factory.mktemp("spelled"), tokenizer_json=byte_level_json(()))


@pytest.fixture(params=["tokens", "text"])
def model(request: pytest.FixtureRequest, qwen: TextModel, spelled: TextModel) -> TextModel:
    return qwen if request.param == "tokens" else spelled


def test_required_takes_any_tool_and_several_calls(model: TextModel) -> None:
    request = ask(tools=(WEATHER, TIME), tool_choice=ToolChoice("required"), reasoning=OFF)
    grammar = Grammar(model, request)
    assert grammar.accepts(CALL)
    assert grammar.accepts(CLOCK)
    assert grammar.accepts(f"{CALL}\n{CLOCK}\n{CALL}")
    assert not grammar.accepts("hello")
    assert not grammar.accepts(CALL + "hello")
    assert not grammar.accepts(CALL.replace("get_weather", "get_w"))
    assert not grammar.accepts(CALL.replace("city", "town"))
    assert not grammar.accepts(CLOCK.replace("utc", "pst"))
    answer = stream(model, f"{CALL}\n{CLOCK}", request, kind="grammar")
    assert [name for name, _ in answer.calls] == ["get_weather", "get_time"]
    assert answer.reason == "tool_calls"


def test_named_takes_one_call_of_that_tool(model: TextModel) -> None:
    grammar = Grammar(
        model, ask(tools=(WEATHER, TIME), tool_choice=ToolChoice("named", name="get_time"), reasoning=OFF)
    )
    assert grammar.accepts(CLOCK)
    assert not grammar.accepts(CALL)
    assert not grammar.accepts(f"{CLOCK}\n{CLOCK}")


def test_allowed_narrows_required_and_parallel_off_is_one_call(model: TextModel) -> None:
    narrowed = ToolChoice("required", allowed=("get_weather",))
    grammar = Grammar(model, ask(tools=(WEATHER, TIME), tool_choice=narrowed, parallel_tool_calls=False, reasoning=OFF))
    assert grammar.accepts(CALL)
    assert not grammar.accepts(CLOCK)
    assert not grammar.accepts(f"{CALL}\n{CALL}")


def test_a_tool_without_parameters(model: TextModel) -> None:
    now = ToolDefinition('odd "name" ünï', None, None)
    grammar = Grammar(model, ask(tools=(now,), tool_choice=ToolChoice("required"), reasoning=OFF))
    text = f'<tool_call>\n{{"name": {json.dumps(now.name, ensure_ascii=False)}, "arguments": {{}}}}\n</tool_call>'
    assert grammar.accepts(text)
    assert not grammar.accepts(text.replace("{}", '{"x": 1}'))


@pytest.mark.parametrize(
    "choice", [ToolChoice("named", name="nobody"), ToolChoice("auto", allowed=("get_weather", "nobody"))]
)
def test_an_unknown_tool_is_refused(qwen: TextModel, choice: ToolChoice) -> None:
    request = ask(tools=(WEATHER,), tool_choice=choice)
    with pytest.raises(ApiError) as caught:
        qwen.resolve(request, qwen.render(request), max_model_len=1000)
    assert caught.value.param == "tool_choice"
    assert "nobody" in caught.value.message


def test_required_without_tools_is_refused(qwen: TextModel) -> None:
    request = ask(tool_choice=ToolChoice("required"))
    with pytest.raises(ApiError):
        qwen.resolve(request, qwen.render(request), max_model_len=1000)


def test_a_document_or_calls_under_auto(model: TextModel) -> None:
    grammar = Grammar(model, json_schema(PERSON, tools=(WEATHER,)))
    assert grammar.accepts('{"name": "Ada", "age": 36}')
    assert grammar.accepts(CALL)
    assert not grammar.accepts("hello")


# ---------------------------------------------------------------- reasoning first


def test_a_thought_may_come_first_where_the_model_thinks(model: TextModel) -> None:
    request = ask(response_format=ResponseFormat("json_object"), reasoning=Reasoning(mode="on"))
    grammar = Grammar(model, request)
    assert grammar.accepts("{}")
    assert grammar.accepts("<think>\nso: {\n</think>\n\n{}")
    assert not grammar.accepts("<think>\nso: {")
    assert not grammar.accepts("<think>\nso\n</think>\n\nhello")
    off = Grammar(model, ask(response_format=ResponseFormat("json_object"), reasoning=OFF))
    assert not off.accepts("<think>\nso\n</think>\n\n{}")
    answer = stream(model, "<think>\nso\n</think>\n\n{}", request, kind="grammar")
    assert (answer.reasoning, answer.text, answer.reason) == ("so", "{}", "stop")


@pytest.mark.parametrize("added", [None, ()])
def test_a_thought_opened_by_the_prompt_has_to_close(tmp_path: Path, added: tuple[str, ...] | None) -> None:
    load(tmp_path, tokenizer_json=None if added is None else byte_level_json(added))
    (tmp_path / "chat_template.jinja").write_text("{{ tools }}{{ messages[-1].content }}[A]<think>\n")
    grammar = Grammar(TextModel.load(tmp_path), ask(tools=(WEATHER,), tool_choice=ToolChoice("required")))
    assert grammar.accepts(f"so\n</think>\n\n{CALL}")
    assert not grammar.accepts(CALL)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_grammars_on_sentencepiece(tmp_path: Path, model_type: str) -> None:
    load(tmp_path, template="qwen3")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type))
    model = TextModel.load(tmp_path)
    request = ask(tools=(WEATHER,), tool_choice=ToolChoice("required"), reasoning=OFF)
    (choice,) = model.resolve(request, model.render(request), max_model_len=100_000)
    assert choice.grammar is not None
    tokenizer = llguidance.LLTokenizer(model.tokenizer_json)
    matcher = llguidance.LLMatcher(tokenizer, choice.grammar.grammar, log_level=0)
    ids = model.tokenizer.encode(CALL)
    if model.tokenizer.token_bytes(ids[0]) == b" ":
        ids = ids[1:]  # the space that sentencepiece puts in front is no part of the output
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_compiling_is_cached_by_content(qwen: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = qwen._grammars
    calls: list[Any] = []
    compile_schema = builder._compile
    monkeypatch.setattr(
        builder, "_compile", lambda *args, **kwargs: calls.append(args) or compile_schema(*args, **kwargs)
    )
    for _ in range(3):
        Grammar(qwen, json_schema({**PERSON, "title": "only here"}))
    assert len(calls) == 1


def test_the_demo_model_carries_grammars(demo: TextModel) -> None:
    request = ask(tools=(WEATHER,), tool_choice=ToolChoice("required"), reasoning=Reasoning(mode="on"))
    grammar = Grammar(demo, request)
    assert grammar.accepts(CALL)
    assert grammar.accepts(f"<think>\nweather\n</think>\n\n{CALL}")
