"""Building blocks of JSON Schema (2020-12), with the habits of our readers: null is the same as absent, and fields that
no schema names are ignored."""

from __future__ import annotations

from typing import Any

from cortex_core.dialects.limits import MAX_MODEL_NAME, MAX_NAME

Schema = dict[str, Any]
Properties = dict[str, "Schema | bool"]

TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}
"""A string that must not be empty."""
TOOL_NAME: Schema = {**NAME, "maxLength": MAX_NAME}
"""Of a tool, a namespace or a call."""
ANY_TOOL_NAME: Schema = {**TEXT, "maxLength": MAX_NAME}
"""The same, where it may be empty."""
MODEL: Schema = {**NAME, "maxLength": MAX_MODEL_NAME, "description": "A model's id, or an alias."}
BOOLEAN: Schema = {"type": "boolean"}
JSON_SCHEMA: Schema = {"type": ["object", "boolean"], "description": "A JSON Schema."}
ASKS_FOR_NOTHING: Schema = {"enum": [None, False, 0, "", [], {}]}
"""A field that is refused by name where it asks for something."""


def ref(name: str) -> Schema:
    """A schema of the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def ignored(names: tuple[str, ...]) -> Properties:
    """Fields that may hold anything."""
    return dict.fromkeys(names, True)


def optional(schema: Schema) -> Schema:
    """Or null, which is the same as absent."""
    kinds = schema.get("type")
    if "enum" in schema:
        return {**{key: value for key, value in schema.items() if key != "type"}, "enum": [*schema["enum"], None]}
    if isinstance(kinds, str):
        return {**schema, "type": [kinds, "null"]}
    if isinstance(kinds, list):
        return {**schema, "type": [*kinds, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


def integer(minimum: int, maximum: int | None = None) -> Schema:
    schema: Schema = {"type": "integer", "minimum": minimum}
    return schema if maximum is None else {**schema, "maximum": maximum}


def number(minimum: float, maximum: float) -> Schema:
    return {"type": "number", "minimum": minimum, "maximum": maximum}


def array(items: Schema | bool, **bounds: int) -> Schema:
    """bounds: minItems, maxItems."""
    return {"type": "array", "items": items, **bounds}


def fields(required: Properties, may: Properties | None = None, *, about: str | None = None) -> Schema:
    """An object with these fields and any others. The required ones are not null."""
    schema: Schema = {"type": "object", "properties": {**required, **(may or {})}}
    if required:
        schema["required"] = list(required)
    return schema if about is None else {**schema, "description": about}


def tagged(tag: str, value: str, required: Properties | None = None, may: Properties | None = None) -> Schema:
    """An object whose `tag` is `value`."""
    return fields({tag: {"const": value}, **(required or {})}, may)


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}
