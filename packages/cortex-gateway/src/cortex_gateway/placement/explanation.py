"""Explanations of a wait, and of a refusal, in words and in figures. Pure.

Nobody waits without a reason, and whoever asks is told it: in the comments that keep a stream alive, in the error of a
request that has waited long enough, in the log, and on `/admin/fleet`.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from cortex_gateway.fleet.snapshot import LoadFailure, NodeSnapshot
from cortex_gateway.placement.decision import Hold
from cortex_gateway.placement.evictor import Account, account, is_in_use, may_yield
from cortex_gateway.placement.state import PlacementState


class Wait(msgspec.Struct, frozen=True):
    """What requests for a model are held for. text goes on after "wait for". behind: the models in the way, or ahead.
    memory: where it is for room."""

    node: str
    reason: str
    text: str
    behind: tuple[str, ...] = ()
    memory: Account | None = None


def explain(model: str, hold: Hold, state: PlacementState) -> Wait:
    """A hold, as it is told. It may be a moment old: what is gone meanwhile is left out."""
    name, reason = hold.node, hold.reason
    node = state.snapshot.nodes.get(name)
    if node is None:
        return Wait(name, reason, f"another node, as {name} leaves the configuration")
    match reason:
        case "unpolled":
            return Wait(name, reason, f"{name}, which has not said yet what it has")
        case "loading":
            return Wait(name, reason, f"its load on {name}")
        case "recovering":
            info = node.models.get(model)
            cause = f": {info.error}" if info is not None and info.error else ""
            return Wait(name, reason, f"its engine on {name}, which is being rebuilt{cause}")
        case "unloading":
            return Wait(name, reason, f"its unload from {name}, after which it comes back")
        case "yielding":
            others = _ahead_of(model, state)
            return Wait(name, reason, f"its next turn on {name}, where {_listed(others)} comes first", others)
        case "queued":
            others = _ahead_of(model, state)
            return Wait(name, reason, f"room on {name}, which {_listed(others)} has waited for longer", others)
    return _for_room(model, hold, node, state)


def _for_room(model: str, hold: Hold, node: NodeSnapshot, state: PlacementState) -> Wait:
    """`busy` and `settling`."""
    failure = node.load_failures.get(model)
    shortage = failure.shortage if failure is not None and failure.until > state.now else None
    memory = account(model, node, state, needed_mb=shortage.needed_mb if shortage is not None else 0)
    in_the_way = may_yield(node, model, state)
    said = ", ".join(f"{other} ({_state(other, node, state)})" for other in in_the_way)
    text = f"room on {node.name}"
    if said:
        text += f" that others hold or take: {said}"
    if memory is not None:
        text += f"; {memory}"
    return Wait(node.name, hold.reason, text, tuple(in_the_way), memory)


def _state(model: str, node: NodeSnapshot, state: PlacementState) -> str:
    status = node.status(model)
    if status != "loaded":
        return str(status)
    if load := state.load_of(node, model):
        return f"{load} request{'s' if load > 1 else ''} at work"
    if is_in_use(node, model, state):
        return "waited for too"
    stay_s = state.stays_until(node, model) - state.now
    return f"new, stays for {math.ceil(stay_s)} s" if stay_s > 0 else "idle"


def _ahead_of(model: str, state: PlacementState) -> tuple[str, ...]:
    waiting = state.waiting
    since = waiting.since(model)
    return tuple(
        other.model
        for other in waiting.in_order()
        if other.model != model and (since is None or (other.since, other.model) < (since, model))
    )


def _listed(models: tuple[str, ...]) -> str:
    return ", ".join(models) or "another model"


# ---------------------------------------------------------------------------------------------- refusals


def numbers_of(model: str, node: NodeSnapshot, failure: LoadFailure, state: PlacementState) -> Account | None:
    """The figures of a load that failed for lack of memory; None for any other, and where none are known."""
    if not failure.lacks_memory:
        return None
    return account(model, node, state, needed_mb=failure.shortage.needed_mb if failure.shortage else 0)


def in_words(node: str, memory: Account | None) -> str:
    return "" if memory is None else f" (On {node}, {memory}.)"


def in_figures(memory: Account | None) -> dict[str, Any]:
    return {} if memory is None else msgspec.to_builtins(memory)
