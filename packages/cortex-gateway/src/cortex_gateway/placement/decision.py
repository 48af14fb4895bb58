"""What can be decided for a request, as values."""

from __future__ import annotations

from typing import Literal

import msgspec
from cortex_core.errors import ErrorKind
from cortex_core.fleet import ModelSpec

HoldReason = Literal["unpolled", "loading", "recovering", "unloading", "busy"]


class Forward(msgspec.Struct, frozen=True):
    """Send it there now."""

    node: str


class Hold(msgspec.Struct, frozen=True):
    """Nothing to start: wait until something changes on `node`, then decide again."""

    node: str
    reason: HoldReason


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


Decision = Forward | Hold | Load | Refuse
