"""Is it a JSON Schema, and one of a size that a compiler can be given.

`check` finds what no JSON Schema may contain (draft 2020-12, with the older `items` list and `definitions`), so that
a bad schema is refused with the place of the fault while a merely unusual one is only loosened (`constraints.py`). It
looks at each subschema once, wherever references lead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from neuron.daemon.text import limits

Schema = dict[str, Any] | bool
Place = tuple["Place", str] | None
"""A path to a subschema, as its last step and the place before; only that of a fault is ever written out."""

TYPES = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})

IN_PLACE_LISTS = ("allOf", "anyOf", "oneOf")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_OTHERS = ("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems")
_SUBSCHEMA = frozenset((*_OF_OTHERS, "propertyNames", "contains", "items", "not", "if", "then", "else"))
_SCHEMA_LISTS = frozenset((*IN_PLACE_LISTS, "prefixItems", "items"))
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_COMPARED = frozenset(("properties", "required", "prefixItems", *IN_PLACE_LISTS))

_FOREIGN = re.compile(r"\\p|\(\?<|\\u\{|\\/|\(\?[a-zA-Z-]+[:)]")
"""What ECMAScript has and Python writes otherwise, or what makes Python fold the case of each letter of a range."""
_SHOWN_CHARACTERS = 200


class SchemaError(Exception):
    """Not a JSON Schema, or too large a one; `path` is a JSON pointer to the fault, cut short."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return f"{self.message} (at {self.path})" if self.path else self.message


class SchemaSize:
    """What of a schema has been counted; see `limits`."""

    __slots__ = ("num_enum_values", "num_nodes", "num_pattern_characters")

    def __init__(self) -> None:
        self.num_nodes = 0
        self.num_enum_values = 0
        self.num_pattern_characters = 0


def check(schema: Any) -> SchemaSize:
    """Raises `SchemaError` if `schema` is no JSON Schema, too large or nested too deeply; returns its size."""
    try:
        num_bytes = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as exc:
        raise SchemaError(f"the schema is not JSON: {exc}") from exc
    if num_bytes > limits.MAX_SCHEMA_BYTES:
        raise SchemaError(f"the schema is too large: {num_bytes} bytes, at most {limits.MAX_SCHEMA_BYTES}")
    size = SchemaSize()
    seen: set[int] = set()
    referred: list[tuple[Any, Place]] = [(schema, None)]
    while referred:  # a reference may lead to what stands under no keyword
        start, place = referred.pop()
        pending: list[tuple[Any, Place, int]] = [(start, place, 0)]
        while pending:
            node, place, depth = pending.pop()
            if isinstance(node, bool) or id(node) in seen:
                continue
            if not isinstance(node, dict):
                raise SchemaError(f"a schema must be an object or a boolean, not {_name_of(node)}", _pointer(place))
            if depth > limits.MAX_SCHEMA_DEPTH:
                raise SchemaError(f"the schema is nested more than {limits.MAX_SCHEMA_DEPTH} levels deep")
            seen.add(id(node))
            size.num_nodes += 1
            if size.num_nodes > limits.MAX_SCHEMA_NODES:
                raise SchemaError(f"the schema has more than {limits.MAX_SCHEMA_NODES} subschemas")
            _check_keywords(node, place, size)
            reference = node.get("$ref")
            if isinstance(reference, str) and reference.startswith("#"):
                target = resolve(reference, schema)
                if target is None:
                    raise SchemaError(f"`$ref` points to nothing: {reference[:80]}", _pointer((place, "$ref")))
                referred.append((target, (place, "$ref")))
            nested = [(child, where, depth + 1) for child, where in _children(node, place)]
            pending.extend(reversed(nested))
    return size


def _children(node: dict[str, Any], place: Place) -> Iterator[tuple[Any, Place]]:
    """Subschemas under the keywords of `node`, and where they stand. Raises `SchemaError` where there can be none."""
    for key, value in node.items():
        if key in _SCHEMA_LISTS and isinstance(value, list):
            inside: Place = (place, key)
            for index, nested in enumerate(value):
                yield nested, (inside, str(index))
        elif key in _SUBSCHEMA:
            yield value, (place, key)
        elif key in _SCHEMA_LISTS:
            raise SchemaError(f"`{key}` must be an array", _pointer((place, key)))
        elif key in SCHEMA_MAPS:
            if not isinstance(value, dict):
                raise SchemaError(f"`{key}` must be an object", _pointer((place, key)))
            inside = (place, key)
            for name, nested in value.items():
                yield nested, (inside, name)


def subschemas(node: Any) -> Iterator[Any]:
    """Subschemas under the keywords of a schema that `check` has passed."""
    if isinstance(node, dict):
        for child, _ in _children(node, None):
            yield child


def _check_keywords(schema: dict[str, Any], place: Place, size: SchemaSize) -> None:
    for key, value in schema.items():
        fault = None
        if key == "type":
            fault = _fault_of_types(value)
        elif key in _COUNTS:
            # 2.0 is an integer in JSON Schema
            is_count = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if isinstance(value, bool) or not is_count or value < 0:
                fault = f"`{key}` must be a non-negative integer"
        elif key in _NUMBERS:
            fault = _fault_of_number(key, value)
        elif key in ("pattern", "format", "$ref"):
            fault = None if isinstance(value, str) else f"`{key}` must be a string"
        elif key in ("required", "enum"):
            fault = _fault_of_list(key, value, size)
        num_entries = len(value) if key in _COMPARED and isinstance(value, list | dict) else 0
        if num_entries > limits.MAX_SCHEMA_BRANCHES:
            fault = fault or f"`{key}` has {num_entries} entries, at most {limits.MAX_SCHEMA_BRANCHES}"
        if fault is not None:
            raise SchemaError(fault, _pointer((place, key)))
    if "pattern" in schema:
        _check_pattern(schema["pattern"], (place, "pattern"), size)
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, dict):
        if len(by_pattern) > limits.MAX_PATTERN_PROPERTIES:
            what = f"{len(by_pattern)} entries, at most {limits.MAX_PATTERN_PROPERTIES}"
            raise SchemaError(f"`patternProperties` has {what}", _pointer((place, "patternProperties")))
        for pattern in by_pattern:
            _check_pattern(pattern, (place, "patternProperties"), size)


def _fault_of_types(kinds: Any) -> str | None:
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            return f"unknown type {json.dumps(kind)[:80]}"
    return None


def _fault_of_number(key: str, value: Any) -> str | None:
    if isinstance(value, bool):
        is_draft4_flag = key.startswith("exclusive")
        return None if is_draft4_flag else f"`{key}` must be a number"
    if not isinstance(value, int | float):
        return f"`{key}` must be a number"
    return "`multipleOf` must be greater than 0" if key == "multipleOf" and value <= 0 else None


def _fault_of_list(key: str, value: Any, size: SchemaSize) -> str | None:
    if not isinstance(value, list):
        return f"`{key}` must be an array"
    if key == "required":
        return None if all(isinstance(name, str) for name in value) else "`required` must hold strings"
    size.num_enum_values += len(value)
    if size.num_enum_values > limits.MAX_ENUM_VALUES:
        return f"the schema has more than {limits.MAX_ENUM_VALUES} values in `enum`"
    return None


def _check_pattern(pattern: str, place: Place, size: SchemaSize) -> None:
    """Patterns are ECMAScript; Python's dialect lacks little of it (`\\p`, `(?<name>`), which is let pass."""
    if len(pattern) > limits.MAX_PATTERN_CHARACTERS:
        what = f"{len(pattern)} characters, at most {limits.MAX_PATTERN_CHARACTERS}"
        raise SchemaError(f"`pattern` has {what}", _pointer(place))
    size.num_pattern_characters += len(pattern)
    if size.num_pattern_characters > limits.MAX_PATTERNS_CHARACTERS:
        what = f"more than {limits.MAX_PATTERNS_CHARACTERS} characters"
        raise SchemaError(f"the regular expressions of the schema have {what}", _pointer(place))
    if _FOREIGN.search(pattern):
        return
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        reason = str(exc)[:_SHOWN_CHARACTERS]
        raise SchemaError(f"`pattern` is no regular expression: {reason}", _pointer(place)) from exc


def _pointer(place: Place) -> str:
    """The JSON pointer, cut short: names in it are the client's and may be of any length."""
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(step if len(step) <= _SHOWN_CHARACTERS else step[:_SHOWN_CHARACTERS] + "…")
    pointer = "".join(f"/{step}" for step in reversed(steps))
    return pointer if len(pointer) <= 2 * _SHOWN_CHARACTERS else pointer[: 2 * _SHOWN_CHARACTERS] + "…"


def _name_of(value: Any) -> str:
    if value is None:
        return "null"
    return {str: "a string", list: "an array", int: "a number", float: "a number"}.get(type(value), "this")


def resolve(reference: str, root: Any) -> Schema | None:
    """The schema a local `$ref` (`#`, `#/…`) points to, None if there is none. Anchors count as found: `True`."""
    if reference == "#":
        return root if isinstance(root, dict | bool) else None
    if not reference.startswith("#/"):
        return True
    node = root
    for step in unquote(reference[2:]).split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and _is_index(name) and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node if isinstance(node, dict | bool) else None


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10
