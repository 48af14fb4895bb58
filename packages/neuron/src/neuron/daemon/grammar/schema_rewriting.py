"""A JSON Schema made into one that the grammar compiler takes: closed where it may be, loosened where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from neuron.daemon.grammar.json_schema import SCHEMA_MAPS

_DATA = frozenset({"enum", "const", "default", "examples", "required", "type"})
_OPEN_ENDED = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties"}
    | {"allOf", "anyOf", "oneOf", "not", "if", "$ref"}
)


def closed(schema: Any) -> Any:
    """Objects with listed properties and no word on others take no others: what comes out still validates, and a
    small model does not wander off into properties of its own. Left alone where composition could need them open.
    """
    if '"allOf"' in json.dumps(schema):
        return schema

    def close(node: dict[str, Any]) -> dict[str, Any]:
        properties, required = node.get("properties"), node.get("required", [])
        # what stands under a keyword that nobody knows may have any form
        if not isinstance(properties, dict) or not isinstance(required, list) or _OPEN_ENDED & node.keys():
            return node
        is_listed = all(isinstance(name, str) and name in properties for name in required)
        return {**node, "additionalProperties": False} if is_listed else node

    return _mapped(schema, close)


def self_contained(schema: Any) -> Any:
    """References that leave the document are never fetched: such a place takes any value. Those inside of it are all
    read from its root, as `json_schema.check` reads them, whatever parts of it call themselves."""

    def loosen(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            node = {key: value for key, value in node.items() if key != "$ref"}
        return {key: value for key, value in node.items() if key != "$id"} if "$id" in node else node

    return _mapped(schema, loosen)


def without_keywords(schema: Any, keywords: frozenset[str]) -> Any:
    return _mapped(schema, lambda node: {key: value for key, value in node.items() if key not in keywords})


def _mapped(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Apply `change` to every schema object of a document, innermost first; data (`enum`, `const`, …) stays."""
    if not isinstance(node, dict):
        return node
    mapped: dict[str, Any] = {}
    for key, value in node.items():
        if key in _DATA:
            mapped[key] = value
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            mapped[key] = {name: _mapped(nested, change) for name, nested in value.items()}
        elif isinstance(value, list):
            mapped[key] = [_mapped(nested, change) for nested in value]
        else:
            mapped[key] = _mapped(value, change)
    return change(mapped)
