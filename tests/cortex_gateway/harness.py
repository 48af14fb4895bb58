"""A gateway and its end."""

from __future__ import annotations

from .gateway_client import MODEL

STREAM = {"model": MODEL, "messages": [], "stream": True}
