"""Schemas that ask for more than they say: each ends in a result or a refusal, in work that their size bounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.grammar.constraints import GrammarBuilder
from neuron.daemon.grammar.json_schema import SchemaError, check
from neuron.daemon.grammar.schema_graph import demands
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.text import limits
from neuron.daemon.text.prompts import Prompt

from tests.counting import assert_linear, steps
from tests.neuron.daemon.grammar.harness import NAMES, builder, built, chain, fanned_out, forced


def refusal(*schemas: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        built(*schemas)
    assert caught.value.status == 400
    assert len(caught.value.message) < 1000, "what a client wrote is quoted in part only"
    return caught.value


@pytest.mark.parametrize("width", [40, 400])
def test_H1_a_forced_tool_whose_schema_refers_to_itself_is_answered(qwen: TextModel, width: int) -> None:
    request = forced(fanned_out(width))
    for _ in range(2):
        (choice,) = qwen.resolve(request, qwen.render(request), max_model_len=100_000)
        assert choice.grammar is not None


def test_H1_a_schema_is_checked_before_anything_else_walks_it(qwen: TextModel) -> None:
    assert refusal({"anyOf": [{"$ref": "#/nowhere"}] * 40}).param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#/anyOf/\u00b2"}]},
        {"anyOf": [{"$ref": "#/anyOf/" + "1" * 5000}]},
        {"type": "object", "x-foo": {"properties": 5, "required": [[]]}},
        {"type": "object", "x-foo": {"properties": {"a": 1}, "required": [[]]}},
        {"$ref": "#/x-foo", "x-foo": {"type": "nonsense"}},
        {"type": "integer", "minimum": -(10**4000), "maximum": 10**4000},
        {"type": "integer", "minimum": 10**5000},
        {"type": "number", "multipleOf": 1e-300},
        {"type": "string", "pattern": "(" * 3000},
        {"type": "string", "pattern": "a" * 4000 + "(?=b)"},
        {"type": "string", "pattern": "(?i:[\x00-\U0010ffff])" * 100},
        {"type": "string", "minLength": 10**9, "maxLength": 10**18},
        {"type": "array", "items": {}, "minItems": 10**9},
        {"$ref": "#/a%2Fb", "a": {"b": {"type": "string"}}},
        {"$ref": "#" + "/a" * 5000},
    ],
)
def test_odd_schemas_are_a_grammar_or_a_400(schema: Any) -> None:
    try:
        built(schema)
    except ApiError as error:
        assert error.status == 400 and len(error.message) < 1000


def test_a_schema_under_no_keyword_is_checked_where_a_reference_leads_to_it() -> None:
    with pytest.raises(SchemaError) as caught:
        check({"$ref": "#/x-foo", "x-foo": {"type": "nonsense"}})
    assert caught.value.path == "/$ref/type"


def test_the_path_to_a_fault_is_written_once_and_cut_short() -> None:
    """Names are the client's: 2,000 subschemas under one of 100,000 characters are no 200 MB of paths."""
    inner: dict[str, Any] = {f"p{n}": {} for n in range(900)}
    schema: dict[str, Any] = {"properties": {"n" * 100_000: {"properties": inner}}}
    check(schema)
    inner["p0"] = 3
    with pytest.raises(SchemaError) as caught:
        check(schema)
    assert caught.value.path.startswith("/properties/nnn")
    assert len(caught.value.path) < 1000


def test_a_schema_is_checked_in_work_linear_in_its_size() -> None:
    def nested(n: int) -> int:
        schema = {"properties": {f"p{i}": {"items": {"anyOf": [{"type": "string"}, {"$ref": "#"}]}} for i in range(n)}}
        return steps(lambda: check(schema))

    assert_linear(nested, 200)


def test_a_chain_of_references_does_not_overflow_the_compilers_stack() -> None:
    """900 definitions, each holding the next: 50 kB that ended the process. In one of its own here, as they did."""
    links = (None, lambda r: {"anyOf": [r, {"type": "null"}]}, lambda r: {"type": "array", "items": r})
    schemas = [chain(limits.MAX_SCHEMA_NODES // 4, link) for link in links]
    assert all(demands(schema).levels > limits.MAX_SCHEMA_LEVELS for schema in schemas)
    program = (
        "import json, sys\nfrom tests.neuron.daemon.grammar.harness import built\n"
        "for schema in json.load(sys.stdin): built(schema)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(schemas), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-300:]}"


def test_more_patterns_than_can_be_intersected_are_let_go() -> None:
    """32 regular expressions for one string, 1.7 kB: the compiler did not come back within a minute."""
    patterns = [f"^[a-z]{{3,{n + 4}}}x" for n in range(32)]
    conjoined = {"type": "string", "allOf": [{"pattern": pattern} for pattern in patterns]}
    nested: dict[str, Any] = {"type": "string"}
    for pattern in patterns:
        nested = {"pattern": pattern, "anyOf": [nested]}
    along_references = chain(31, lambda reference: {"pattern": patterns[0], **reference})
    for schema in (conjoined, nested, along_references):
        assert demands(schema).patterns >= 31
        assert patterns[0] not in built(schema)
    one_each = {"anyOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}
    assert demands(one_each).patterns == 1
    assert patterns[-1] in built({"properties": {"a": one_each}})


def test_multiples_of_large_numbers_are_not_told() -> None:
    """Each remainder is a state: 99,991 of them take a second, and more than a lexer may have."""
    assert demands({"multipleOf": 99_991}).multiple_states == 2**17
    assert demands({"allOf": [{"multipleOf": 97}, {"multipleOf": 101}]}).multiple_states == 2 * 2**7
    assert demands({"multipleOf": 97, "allOf": [{"multipleOf": 101}]}).multiple_states == 2**14 + 2**7
    assert demands({"multipleOf": 0.01}).multiple_states == 0
    assert demands({"multipleOf": 10**4000}).multiple_states == 2**64
    integer = {"type": "integer"}
    assert "multipleOf" not in built({"properties": {"a": {**integer, "multipleOf": 99_991}}})
    assert "multipleOf" in built({"properties": {"a": {**integer, "multipleOf": 1000}}})


def test_a_large_schema_that_does_not_compile_is_loosened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    failure = GrammarBuilder._failure
    monkeypatch.setattr(GrammarBuilder, "_failure", lambda self, text: tried.append(text) or failure(self, text))
    not_disjoint = {"patternProperties": {"^a": {}, "^ab": {"type": "integer"}}}
    for nodes, keeps_lengths in ((10, True), (limits.MAX_SCHEMA_NODES_TRIED_OFTEN, False)):
        tried.clear()
        properties = {name: {"type": "string", "minLength": 1} for name in NAMES[:nodes]}
        grammar = built({"type": "object", "properties": {**properties, "p": not_disjoint}})
        assert ("minLength" in grammar) == keeps_lengths
        assert len(tried) == 4, "as it is, leniently, loosened, and the whole grammar"


def test_a_long_enum_is_not_matched_value_by_value() -> None:
    schema = {"enum": [f"v{n}" for n in range(5000)], "pattern": "^(a|b)*a(a|b){15}$"}
    assert demands(schema).matched_values == 5000
    assert "v4999" in built({"properties": {"a": schema}})


def nested_deeply(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def with_patterns(*lengths: int) -> dict[str, Any]:
    return {"properties": {f"p{n}": {"pattern": "a" * length} for n, length in enumerate(lengths)}}


def with_nodes(count: int) -> dict[str, Any]:
    """`count` subschemas, the root among them."""
    groups, rest = divmod(count - 1, 500)
    properties: dict[str, Any] = {
        f"g{n}": {"properties": {name: {} for name in NAMES[:499]}} for n in range(groups)
    } | ({"rest": {"properties": {name: {} for name in NAMES[: rest - 1]}}} if rest else {})
    return {"properties": properties}


WITHIN_AND_BEYOND = {
    "MAX_SCHEMA_BYTES": (
        {"title": "x" * (limits.MAX_SCHEMA_BYTES - 13)},
        {"title": "x" * (limits.MAX_SCHEMA_BYTES - 12)},
        limits.MAX_SCHEMA_BYTES,
    ),
    "MAX_SCHEMA_DEPTH": (
        nested_deeply(limits.MAX_SCHEMA_DEPTH),
        nested_deeply(limits.MAX_SCHEMA_DEPTH + 1),
        limits.MAX_SCHEMA_DEPTH,
    ),
    "MAX_SCHEMA_NODES": (
        with_nodes(limits.MAX_SCHEMA_NODES),
        with_nodes(limits.MAX_SCHEMA_NODES + 1),
        limits.MAX_SCHEMA_NODES,
    ),
    **{
        f"MAX_SCHEMA_BRANCHES {key}": (
            {key: make(limits.MAX_SCHEMA_BRANCHES)},
            {key: make(limits.MAX_SCHEMA_BRANCHES + 1)},
            limits.MAX_SCHEMA_BRANCHES,
        )
        for key, make in {
            "properties": lambda n: {name: {} for name in NAMES[:n]},
            "required": lambda n: NAMES[:n],
            **{key: lambda n: [{}] * n for key in ("anyOf", "oneOf", "allOf", "prefixItems")},
        }.items()
    },
    "MAX_PATTERN_PROPERTIES": (
        {"patternProperties": {f"^x{n}$": {} for n in range(limits.MAX_PATTERN_PROPERTIES)}},
        {"patternProperties": {f"^x{n}$": {} for n in range(limits.MAX_PATTERN_PROPERTIES + 1)}},
        limits.MAX_PATTERN_PROPERTIES,
    ),
    "MAX_ENUM_VALUES": (
        {"enum": list(range(limits.MAX_ENUM_VALUES))},
        {"enum": list(range(limits.MAX_ENUM_VALUES + 1))},
        limits.MAX_ENUM_VALUES,
    ),
    "MAX_PATTERN_CHARACTERS": (
        with_patterns(limits.MAX_PATTERN_CHARACTERS),
        with_patterns(limits.MAX_PATTERN_CHARACTERS + 1),
        limits.MAX_PATTERN_CHARACTERS,
    ),
    "MAX_PATTERNS_CHARACTERS": (
        with_patterns(*[4096] * 8),
        with_patterns(*[4096] * 8, 1),
        limits.MAX_PATTERNS_CHARACTERS,
    ),
}


@pytest.mark.parametrize("name", WITHIN_AND_BEYOND)
def test_at_a_limit_and_beyond_it(name: str) -> None:
    within, beyond, limit = WITHIN_AND_BEYOND[name]
    check(within)
    error = refusal(beyond)
    assert error.param == "tools[0].function.parameters"
    assert str(limit) in error.message


def test_the_schemas_of_one_request_are_bounded_together() -> None:
    each = with_nodes(limits.MAX_SCHEMA_NODES)
    count = limits.MAX_REQUEST_SCHEMA_NODES // limits.MAX_SCHEMA_NODES
    # the same one, so that only the first is compiled
    error = refusal(*[each] * count, {"type": "object", "properties": {}})
    assert error.param == f"tools[{count}].function.parameters"
    assert str(limits.MAX_REQUEST_SCHEMA_NODES) in error.message
    half = {"type": "object", "properties": {"a": {"title": "x" * (limits.MAX_SCHEMA_BYTES // 2 - 100)}}}
    other = {"type": "object", "properties": {"b": {"title": "x" * (limits.MAX_SCHEMA_BYTES // 2 + 100)}}}
    built(half)
    error = refusal(half, other)
    assert error.param == "tools[1].function.parameters"
    assert str(limits.MAX_SCHEMA_BYTES) in error.message


def test_what_is_kept_of_compiled_schemas_is_bounded_in_bytes() -> None:
    grammars = builder()
    for number in range(100):
        request = forced({"type": "object", "properties": {}, "title": f"{number}" + "x" * 400_000})
        grammars.build(request, Prompt(token_ids=[1], text="a"))
    assert 0 < grammars._schemas.num_bytes <= limits.MAX_CACHED_GRAMMAR_BYTES
    assert len(grammars._schemas) < 50
    assert grammars._failures.num_bytes < limits.MAX_CACHED_GRAMMAR_BYTES


def test_the_table_of_limits_is_true() -> None:
    reference = (Path(__file__).parents[4] / "docs/reference/http-api.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+)\b", reference, re.MULTILINE)
    table = {(name, int(value.replace(",", ""))) for name, value in rows}
    of_checkpoints = {"MAX_VOCABULARY", "MAX_MERGED_CHARACTERS"}
    inner = {"MAX_TYPE_STEPS", "MAX_CACHED_GRAMMAR_BYTES", "MAX_SCHEMA_NODES_TRIED_OFTEN"}
    said = {name: value for name, value in vars(limits).items() if name.isupper()}
    missing = [name for name, value in said.items() if (name, value) not in table]
    assert set(missing) == of_checkpoints | inner
