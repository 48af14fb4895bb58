"""Types of a value under a JSON Schema, and what a text spells under one.

Nothing is taken for granted of the schema: under `tool_choice: auto` none is checked before the model has answered.
"""

from __future__ import annotations

import json
from typing import Any

from neuron.daemon.grammar.json_schema import IN_PLACE_LISTS, resolve
from neuron.daemon.text import limits

Types = frozenset[str]
UNKNOWN: Types = frozenset()


class StepBudget:
    """How many schemas and values may still be looked at."""

    __slots__ = ("left",)

    def __init__(self, steps: int = limits.MAX_TYPE_STEPS) -> None:
        self.left = steps


class SchemaTypes:
    """The types of values under the subschemas of one document; each answer is remembered.

    root: what references are resolved in; kept alive, so that its parts are known by identity. budget: of all answers
    together. Once it is used up, the schema does not say.
    """

    def __init__(self, root: Any, budget: StepBudget | None = None) -> None:
        self._root = root
        self._known: dict[int, Types] = {}
        self._budget = StepBudget() if budget is None else budget

    def of(self, schema: Any) -> Types:
        """The JSON types that a value may have; empty when the schema does not say."""
        if not isinstance(schema, dict):
            return UNKNOWN
        known = self._known.get(id(schema))
        if known is None:
            known = self._known[id(schema)] = self._walk(schema)
        return known

    def _walk(self, schema: dict[str, Any]) -> Types:
        """Each schema is entered once: one that is being looked at, or has been, adds what it has found so far."""
        found: dict[int, set[str]] = {id(schema): set()}
        path = [(schema, self._enter(schema, found[id(schema)]))]
        while path:
            node, waiting = path[-1]
            if self._budget.left <= 0:
                return UNKNOWN
            types = found[id(node)]
            while waiting:
                child = waiting.pop()
                if id(child) in found:
                    types |= found[id(child)]
                    continue
                inner = found[id(child)] = set()
                path.append((child, self._enter(child, inner)))
                break
            else:
                if not types and "$ref" not in node:
                    types |= {"object"} if "properties" in node else {"array"} if "items" in node else set()
                path.pop()
                if path:
                    found[id(path[-1][0])] |= types
        return frozenset(found[id(schema)])

    def _enter(self, node: dict[str, Any], types: set[str]) -> list[dict[str, Any]]:
        """What `node` itself says goes into `types`; returns the schemas that have to say it where it does not."""
        self._budget.left -= 1
        kinds = node.get("type")
        if isinstance(kinds, str | list):
            named = [kinds] if isinstance(kinds, str) else kinds[: self._budget.left]
            types.update(kind for kind in named if isinstance(kind, str))
            self._budget.left -= len(named)
            return []
        values = node["enum"] if isinstance(node.get("enum"), list) else []
        if "const" in node:
            values = [node["const"]]
        if values:
            self._budget.left -= len(values)
            types.update(_type_of_value(value) for value in (values if self._budget.left > 0 else ()))
            return []
        if isinstance(node.get("$ref"), str):
            self._budget.left -= len(node["$ref"]) // 64
            target = resolve(node["$ref"], self._root)
            return [target] if isinstance(target, dict) else []
        children = [
            child
            for key in IN_PLACE_LISTS
            for child in (node[key] if isinstance(node.get(key), list) else ())
            if isinstance(child, dict)
        ]
        self._budget.left -= len(children)
        return children


class ArgumentTypes:
    """The types of one tool's arguments, by their names, of which `names` are known."""

    def __init__(self, parameters: dict[str, Any] | None, budget: StepBudget) -> None:
        properties = (parameters or {}).get("properties")
        self.names: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self._types = SchemaTypes(parameters, budget)

    def of(self, name: str) -> Types:
        return self._types.of(self.names.get(name))


def types_of(schema: Any, root: Any) -> Types:
    """`SchemaTypes.of`, once."""
    return SchemaTypes(root).of(schema)


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


def coerce(text: str, kinds: Types) -> Any:
    """The value that `text` spells as one of `kinds`: a string stays, other types are parsed, a failure stays text.

    Where no type is known, what is plainly JSON (number, boolean, null, object, array) becomes that.
    """
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
