"""What requests say of themselves, and fleets in which one model is short of room."""

from __future__ import annotations

import json
from typing import Any

from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_gateway.fleet.snapshot import LoadFailure, NodeSnapshot, Shortage
from cortex_gateway.placement.router import decide
from cortex_gateway.placement.session_hints import RequestHints

from .fleets import state


def hints(body: dict[str, Any], **headers: str) -> RequestHints:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return RequestHints(raw, json.dumps(body, separators=(",", ":")).encode())


def models(**vram_mb: int) -> Catalogue:
    return Catalogue(models=tuple(ModelProfile(id=name, vram_mb=mb) for name, mb in vram_mb.items()))


SIZES = models(m=20_000, a=16_000, b=4_000)


def decided(
    snapshot: NodeSnapshot, *, catalogue: Catalogue = SIZES, waited_s: float | None = None, **fields: Any
) -> Any:
    waiting = {} if waited_s is None else {"m": 100.0 - waited_s}
    return decide("m", state(snapshot, catalogue=catalogue, waiting=waiting, **fields))


def shortage(needed: int, free: int, *, is_passing: bool = False) -> LoadFailure:
    return LoadFailure(
        message="The model `m` could not be loaded on alpha: no room.",
        code="insufficient_vram",
        until=200.0,
        lacks_memory=True,
        shortage=Shortage(
            needed_mb=needed, free_mb=free, required_mb={0: needed}, available_mb={0: free}, is_passing=is_passing
        ),
        free_mb={0: free},
    )
