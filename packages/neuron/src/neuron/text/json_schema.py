"""The little of JSON Schema that is needed before a grammar: is it one, and which types does a value have.

`check` finds what no JSON Schema may contain (draft 2020-12, with the older `items` list and `definitions`), so that
a bad schema is refused with the place of the fault while a merely unusual one is only loosened (`constraints.py`).
"""

from __future__ import annotations

import json
import re
from typing import Any

Schema = dict[str, Any] | bool

TYPES = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
MAX_SCHEMA_BYTES = 512 * 1024
MAX_SCHEMA_DEPTH = 64

_SUBSCHEMA = ("additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains")
_SUBSCHEMA_MORE = ("not", "if", "then", "else", "additionalItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class SchemaError(Exception):
    """Not a JSON Schema; `path` is a JSON pointer to the fault."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return f"{self.message} (at {self.path})" if self.path else self.message


def check(schema: Any) -> None:
    """Raises `SchemaError` if `schema` is no JSON Schema, too large or nested too deeply."""
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as exc:
        raise SchemaError(f"the schema is not JSON: {exc}") from exc
    if size > MAX_SCHEMA_BYTES:
        raise SchemaError(f"the schema is too large: {size} bytes, at most {MAX_SCHEMA_BYTES}")
    _check(schema, schema, "", 0)


def _check(schema: Any, root: Any, path: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaError(f"a schema must be an object or a boolean, not {_name_of(schema)}", path)
    if depth > MAX_SCHEMA_DEPTH:
        raise SchemaError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep", path)
    _check_keywords(schema, path)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and resolve(reference, root) is None:
        raise SchemaError(f"`$ref` points to nothing: {reference}", f"{path}/$ref")
    for key in (*_SUBSCHEMA, *_SUBSCHEMA_MORE):
        if key in schema:
            _check(schema[key], root, f"{path}/{key}", depth + 1)
    for key in _SCHEMA_MAPS:
        if key in schema:
            if not isinstance(schema[key], dict):
                raise SchemaError(f"`{key}` must be an object", f"{path}/{key}")
            for name, nested in schema[key].items():
                _check(nested, root, f"{path}/{key}/{name}", depth + 1)
    for key in _SCHEMA_LISTS:
        if key in schema:
            if not isinstance(schema[key], list):
                raise SchemaError(f"`{key}` must be an array", f"{path}/{key}")
            for index, nested in enumerate(schema[key]):
                _check(nested, root, f"{path}/{key}/{index}", depth + 1)
    items = schema.get("items", True)
    for index, nested in enumerate(items if isinstance(items, list) else [items]):
        _check(nested, root, f"{path}/items/{index}" if isinstance(items, list) else f"{path}/items", depth + 1)


def _check_keywords(schema: dict[str, Any], path: str) -> None:
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            raise SchemaError(f"unknown type {json.dumps(kind)[:80]}", f"{path}/type")
    for key in ("required", "enum"):
        if key in schema and not isinstance(schema[key], list):
            raise SchemaError(f"`{key}` must be an array", f"{path}/{key}")
    if any(not isinstance(name, str) for name in schema.get("required", ())):
        raise SchemaError("`required` must hold strings", f"{path}/required")
    for key in ("pattern", "format", "$ref"):
        if key in schema and not isinstance(schema[key], str):
            raise SchemaError(f"`{key}` must be a string", f"{path}/{key}")
    for key in _COUNTS:
        value = schema.get(key, 0)
        # 2.0 is an integer in JSON Schema
        is_count = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_count or value < 0:
            raise SchemaError(f"`{key}` must be a non-negative integer", f"{path}/{key}")
    for key in _NUMBERS:
        value = schema.get(key, 1)
        is_draft4_flag = isinstance(value, bool) and key.startswith("exclusive")
        if not is_draft4_flag and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SchemaError(f"`{key}` must be a number", f"{path}/{key}")
    if not isinstance(schema.get("multipleOf", 1), bool) and schema.get("multipleOf", 1) <= 0:
        raise SchemaError("`multipleOf` must be greater than 0", f"{path}/multipleOf")
    _check_pattern(schema.get("pattern"), f"{path}/pattern")
    if isinstance(schema.get("patternProperties"), dict):
        for pattern in schema["patternProperties"]:
            _check_pattern(pattern, f"{path}/patternProperties")


def _check_pattern(pattern: str | None, path: str) -> None:
    """Patterns are ECMAScript; Python's dialect lacks little of it (`\\p`, `(?<name>`), which is let pass."""
    if pattern is None or "\\p" in pattern or "(?<" in pattern or "\\u{" in pattern or "\\/" in pattern:
        return
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise SchemaError(f"`pattern` is no regular expression: {exc}", path) from exc


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
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~").replace("%25", "%")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node if isinstance(node, dict | bool) else None


def types_of(schema: Any, root: Any, _depth: int = 0) -> frozenset[str]:
    """The JSON types a value may have; empty when the schema does not say."""
    if not isinstance(schema, dict) or _depth > 16:
        return frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset({kinds})
    if isinstance(kinds, list):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    values = schema["enum"] if isinstance(schema.get("enum"), list) else []
    if "const" in schema:
        values = [schema["const"]]
    if values:
        return frozenset(_type_of_value(value) for value in values)
    if isinstance(schema.get("$ref"), str):
        return types_of(resolve(schema["$ref"], root), root, _depth + 1)
    found: frozenset[str] = frozenset()
    for key in ("anyOf", "oneOf", "allOf"):
        for nested in schema[key] if isinstance(schema.get(key), list) else ():
            found |= types_of(nested, root, _depth + 1)
    if not found and "properties" in schema:
        return frozenset({"object"})
    if not found and "items" in schema:
        return frozenset({"array"})
    return found


def _type_of_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def coerce(text: str, schema: Any, root: Any) -> Any:
    """The value that `text` spells under `schema`: a string stays, other types are parsed, a failure stays text.

    Where the schema names no type, what is plainly JSON (number, boolean, null, object, array) becomes that.
    """
    kinds = types_of(schema, root)
    if kinds == {"string"}:
        return text
    stripped = text.strip()
    if stripped in ("true", "false", "True", "False") and (not kinds or "boolean" in kinds):
        return stripped in ("true", "True")
    if stripped in ("null", "None") and (not kinds or "null" in kinds):
        return None
    try:
        value = json.loads(stripped)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    kind = _type_of_value(value)
    if not kinds:
        return text if kind == "string" else value
    if kind == "number" and "integer" in kinds and "number" not in kinds and value.is_integer():
        return int(value)
    allowed = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if allowed else text
