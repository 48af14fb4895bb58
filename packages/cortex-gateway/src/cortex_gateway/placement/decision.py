"""Decisions on a request, as values."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from cortex_core.errors import ErrorKind
from cortex_core.fleet import ModelSpec

HoldReason = Literal["unpolled", "loading", "recovering", "unloading", "busy", "settling", "queued", "yielding"]
"""`busy`: what would have to go has work in flight; `settling`: it has only just been loaded; `queued`: another
model's requests have waited longer for the same room; `yielding`: the model is there, but has to make room for one
whose requests have waited too long."""

RouteReason = Literal["loaded", "session", "prefix", "held", "cold"]
"""What `x-cortex-route` says: the least loaded node that had the model; the one that knows the session or the
beginning of the prompt; or that the request waited, for something to change or for a load."""


class Forward(msgspec.Struct, frozen=True):
    """Send it there now."""

    node: str
    reason: RouteReason = "loaded"


class Hold(msgspec.Struct, frozen=True):
    """Nothing to start: wait until something changes on `node`, or until `until`, then decide again."""

    node: str
    reason: HoldReason
    until: float | None = None


class Load(msgspec.Struct, frozen=True):
    """Unload `victims` on `node`, in this order, then load."""

    node: str
    spec: ModelSpec
    victims: tuple[str, ...] = ()


class Refuse(msgspec.Struct, frozen=True):
    """No node can, now or ever; the fields are those of `ApiError`."""

    kind: ErrorKind
    message: str
    code: str
    retry_after: int | None = None
    status: int | None = None
    extras: dict[str, Any] = {}


Decision = Forward | Hold | Load | Refuse
