"""A surface: one inference route of one dialect, and how that dialect frames what the gateway itself has to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from cortex_core.errors import ApiError

Dialect = Literal["openai", "anthropic"]


class Surface(msgspec.Struct, frozen=True):
    """paths are those the gateway listens on, upstream_path the one it calls on a neuron.

    ping keeps a waiting stream alive; error_event(error, request_id) ends a stream that has begun. What generates
    nothing uses no tokens of a key's limits.
    """

    name: str
    dialect: Dialect
    upstream_path: str
    paths: tuple[str, ...]
    ping: bytes
    error_event: Callable[[ApiError, str], bytes]
    can_stream: bool = True
    generates: bool = True
