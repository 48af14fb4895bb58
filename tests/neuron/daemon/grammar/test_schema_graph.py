"""What a schema demands of a compiler, found without compiling it."""

from __future__ import annotations

from typing import Any

import pytest
from neuron.daemon.grammar.schema_graph import demands
from neuron.daemon.text import limits

from tests.counting import assert_linear, steps
from tests.neuron.daemon.grammar.harness import NAMES, built, chain


@pytest.mark.parametrize(
    ("schema", "levels"),
    [
        ({}, 1),
        ({"items": {"items": {}}}, 3),
        (chain(9), 20),
        ({"properties": {"a": {"$ref": "#"}}}, 2),
        ({"$defs": {"x": {"$anchor": "here", "items": {}}}, "items": {"$ref": "#here"}}, 4),
        ({"$defs": {"x": {"properties": {"y": {"$ref": "#/$defs/y"}}}, "y": {"items": {"$ref": "#/$defs/x"}}}}, 5),
    ],
)
def test_levels_follow_references_and_count_a_cycle_once(schema: Any, levels: int) -> None:
    assert demands(schema).levels == levels


def test_a_part_that_calls_itself_a_document_does_not_hide_its_depth() -> None:
    """Read from its own root, `#/$defs/d0` would be the head of a chain that the outer root's `d0` is not."""
    inner = chain(1000)
    harmless: dict[str, Any] = {name: {} for name in inner["$defs"]}
    schema = {"$defs": {**harmless, "inner": {**inner, "$id": "http://example.org/inner"}}, "$ref": "#/$defs/inner"}
    assert "$id" not in built(schema)


def test_pattern_properties_are_counted_through_all_of() -> None:
    parts = [{"patternProperties": {f"^x{n}_{i}$": {} for i in range(30)}} for n in range(4)]
    assert demands({"allOf": parts}).pattern_properties == 120
    assert demands({"anyOf": parts}).pattern_properties == 30
    built({"allOf": parts})


def test_classes_that_ignore_case_are_counted() -> None:
    """13 ms each where they span all letters."""
    schema = {"type": "string", "pattern": "(?i:[\x00-\U0010ffff])" * 100}
    assert demands(schema).folded_classes == 100
    assert "(?i" not in built({"properties": {"a": schema}})
    assert "(?i" in built({"properties": {"a": {"type": "string", "pattern": "(?i:[a-z]+)"}}})


def test_definitions_that_are_merged_again_and_again_are_counted_each_time() -> None:
    """60 pattern properties, put together with something else in 400 places: 34 kB, 6 s."""
    sorted_by = {"type": "object", "patternProperties": {f"^x{n:02}$": {} for n in range(60)}}
    required = {"type": "object", "required": NAMES[:900]}
    for shared, places in ((sorted_by, 400), (required, 200)):
        parts = {
            f"q{n}": {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"const": n}}}]} for n in range(places)
        }
        schema = {"$defs": {"a": shared}, "type": "object", "properties": parts}
        assert demands(schema).merge_work > limits.MAX_MERGE_WORK
        assert "allOf" not in built(schema)
    few = {"$defs": {"a": sorted_by}, "type": "object", "properties": dict(list(parts.items())[:5])}
    assert demands(few).merge_work <= limits.MAX_MERGE_WORK
    assert "allOf" in built(few)


@pytest.mark.parametrize("n", [100])
def test_demands_are_found_in_work_linear_in_the_schema(n: int) -> None:
    def doubled(n: int) -> int:
        schema = chain(n, lambda r: {"allOf": [r, r], "anyOf": [r, {"pattern": "a"}]}, pattern="b")
        return steps(lambda: demands(schema))

    assert_linear(doubled, n)
