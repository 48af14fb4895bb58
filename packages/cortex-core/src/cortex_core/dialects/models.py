"""`GET /v1/models` and `GET /v1/models/{id}`: one superset object that satisfies the clients of both dialects, and
Anthropic's own for clients that send its headers.

OpenAI clients read `id, object, created, owned_by`; Anthropic's `id, type, display_name, created_at, lifecycle` and
a `capabilities` object that is complete wherever it is present; local clients the flat limits; cortex its own
`loaded, feasible_on, locations`. The reference's `capabilities` list is `modalities` here, the name being taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from cortex_core.errors import ApiError, invalid
from cortex_core.fleet import ContextLimit, ModelCost, ModelLocation

_encode = msgspec.json.Encoder().encode

MAX_PAGE = 1000


class ModelEntry(msgspec.Struct, frozen=True):
    """A model that can be asked for, loaded or not.

    created: Unix seconds. modalities: `text`, `vision`. feasible_on and locations are known to a gateway only.
    """

    id: str
    created: int
    display_name: str | None = None
    owned_by: str = "cortex"
    loaded: bool = True
    modalities: tuple[str, ...] = ("text",)
    limit: ContextLimit | None = None
    cost: ModelCost | None = None
    tool_call: bool = False
    reasoning: bool = False
    feasible_on: tuple[str, ...] | None = None
    locations: tuple[ModelLocation, ...] | None = None


class Page(msgspec.Struct, frozen=True):
    """Which part of the list is asked for. limit None: all of it, which is what OpenAI clients expect."""

    limit: int | None = None
    after_id: str | None = None
    before_id: str | None = None


def parse_page(query: Mapping[str, str]) -> Page:
    """`limit`, `after_id` and `before_id` of a query string; others are ignored. Raises `ApiError`."""
    limit: int | None = None
    text = query.get("limit")
    if text:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_PAGE):
            raise invalid(f"limit: must be an integer between 1 and {MAX_PAGE}", param="limit")
        limit = int(text)
    return Page(limit, query.get("after_id") or None, query.get("before_id") or None)


def model_body(entry: ModelEntry) -> bytes:
    """One model."""
    return _encode(model_object(entry))


def models_body(entries: Sequence[ModelEntry], page: Page | None = None) -> bytes:
    """The list, or the asked part of it. Raises `ApiError` where a cursor names no model."""
    shown, has_more = _cut(entries, page or Page())
    return _encode(
        {
            "object": "list",
            "data": [model_object(entry) for entry in shown],
            "has_more": has_more,
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
        }
    )


ANTHROPIC_FIELDS = (
    "id",
    "type",
    "display_name",
    "created_at",
    "lifecycle",
    "max_input_tokens",
    "max_tokens",
    "capabilities",
)
"""What stands in a model of the Anthropic dialect. The superset holds all of it, and more."""


def anthropic_model_body(entry: ModelEntry) -> bytes:
    """One model for a client that says by its headers that it speaks Anthropic's dialect."""
    return _encode(_anthropic_object(entry))


def anthropic_models_body(entries: Sequence[ModelEntry], page: Page | None = None) -> bytes:
    """The list for such a client. Raises `ApiError` where a cursor names no model."""
    shown, has_more = _cut(entries, page or Page())
    return _encode(
        {
            "data": [_anthropic_object(entry) for entry in shown],
            "has_more": has_more,
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
        }
    )


def _anthropic_object(entry: ModelEntry) -> dict[str, Any]:
    model = model_object(entry)
    return {name: model[name] for name in ANTHROPIC_FIELDS if name in model}


def _cut(entries: Sequence[ModelEntry], page: Page) -> tuple[Sequence[ModelEntry], bool]:
    """The page, and whether there is more in the direction of travel."""
    if page.before_id is not None:
        before = entries[: _position(entries, page.before_id, "before_id")]
        shown = before if page.limit is None else before[-page.limit :]
        return shown, len(shown) < len(before)
    rest = entries if page.after_id is None else entries[_position(entries, page.after_id, "after_id") + 1 :]
    shown = rest if page.limit is None else rest[: page.limit]
    return shown, len(shown) < len(rest)


def _position(entries: Sequence[ModelEntry], model_id: str, param: str) -> int:
    for index, entry in enumerate(entries):
        if entry.id == model_id:
            return index
    raise _unknown_cursor(model_id, param)


def _unknown_cursor(model_id: str, param: str) -> ApiError:
    return invalid(f"{param}: no model has the id '{model_id}'", param=param)


def model_object(entry: ModelEntry) -> dict[str, Any]:
    """The superset object. What is not known is left out rather than given as 0 or null."""
    result: dict[str, Any] = {
        "id": entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": entry.owned_by,
        "type": "model",
        "display_name": entry.display_name or entry.id,
        "created_at": datetime.fromtimestamp(entry.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "loaded": entry.loaded,
        "modalities": entry.modalities,
        "tool_call": entry.tool_call,
        "reasoning": entry.reasoning,
        "capabilities": _capabilities(entry),
    }
    if entry.limit is not None:
        result |= _limits(entry.limit)
    for name in ("cost", "feasible_on", "locations"):
        value = getattr(entry, name)
        if value is not None:
            result[name] = value
    return result


def _limits(limit: ContextLimit) -> dict[str, Any]:
    """The window under each name that some client reads. `max_tokens` is Anthropic's bound of an answer."""
    limits: dict[str, Any] = {
        "limit": limit,
        "max_model_len": limit.context,
        "context_length": limit.context,
        "max_input_tokens": limit.input or limit.context,
        "max_tokens": limit.output or limit.context,
    }
    if limit.output:
        limits["max_output_tokens"] = limit.output
    return limits


def _capabilities(entry: ModelEntry) -> dict[str, Any]:
    """Every key of Anthropic's object: its clients read them without asking whether they are there."""
    no = {"supported": False}
    reasons = {"supported": entry.reasoning}
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": {"supported": False},
        "effort": dict.fromkeys(("low", "medium", "high", "xhigh", "max"), reasons) | reasons,
        "image_input": {"supported": "vision" in entry.modalities},
        "pdf_input": no,
        "server_tools": {"supported": False, "web_search": no, "code_execution": no},
        "structured_outputs": {"supported": True},
        "thinking": reasons
        | {
            "types": {
                "adaptive": reasons,
                "between_tools": {"supported": True},
                "disabled": {"supported": True},
                "enabled": reasons,
            }
        },
    }
