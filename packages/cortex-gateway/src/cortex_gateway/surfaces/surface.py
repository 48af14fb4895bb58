"""A surface: one inference route of one dialect, and how that dialect frames what the gateway itself has to say."""

from __future__ import annotations

from typing import Literal

import msgspec

from cortex_gateway.http.framing import Framing

Dialect = Literal["openai", "anthropic"]


class Surface(msgspec.Struct, frozen=True):
    """paths are those the gateway listens on, upstream_path the one it calls on a neuron.

    framing: of an answer that is streamed. What generates nothing uses no tokens of a key's limits.
    """

    name: str
    dialect: Dialect
    upstream_path: str
    paths: tuple[str, ...]
    framing: Framing
    can_stream: bool = True
    generates: bool = True
