"""Maintenance of its own accord: unload what nobody uses, recycle what has been swapped around too often. Pure.

An unload frees all memory of a model at once, but what stays on a device beside many that came and went may lie in
the way: after `defrag_after_cycles` evictions on a node, each of its models is unloaded and loaded again when idle.
"""

from __future__ import annotations

import msgspec
from cortex_core.catalogue import load_spec
from cortex_core.fleet import ModelSpec

from cortex_gateway.fleet.snapshot import NodeSnapshot
from cortex_gateway.placement.evictor import is_in_use
from cortex_gateway.placement.router import spec_of
from cortex_gateway.placement.state import PlacementState


class UnloadIdle(msgspec.Struct, frozen=True):
    """A model that nobody has used for `idle_s` goes."""

    node: str
    model: str
    idle_s: float


class Recycle(msgspec.Struct, frozen=True):
    """Unload and load again, as it was."""

    node: str
    model: str
    spec: ModelSpec


class BeginDefrag(msgspec.Struct, frozen=True):
    """Enough evictions on this node: every model that is there now is to be recycled, each once it is idle."""

    node: str


class EndDefrag(msgspec.Struct, frozen=True):
    """A node that is in order again takes loads."""

    node: str


Chore = UnloadIdle | Recycle | BeginDefrag | EndDefrag


def plan_maintenance(state: PlacementState) -> tuple[Chore, ...]:
    """All chores that are due. At most one of a node moves a model, and none touches one that is in use."""
    return tuple(chore for node in state.snapshot.nodes.values() for chore in _chores(node, state))


def _chores(node: NodeSnapshot, state: PlacementState) -> list[Chore]:
    if not node.is_routable or node.is_draining or not node.can_load:
        return []
    chores: list[Chore] = []
    every = state.policy.defrag_after_cycles
    if node.defrag_since is None and every and node.lifecycle_cycles - node.defragged_cycles >= every:
        chores.append(BeginDefrag(node=node.name))
    if node.operations:
        return chores
    idle = [
        model for model in sorted(node.models) if node.status(model) == "loaded" and not is_in_use(node, model, state)
    ]
    unload = next((chore for model in idle if (chore := _idle_unload(node, model, state))), None)
    if unload is not None:
        return [*chores, unload]
    if node.defrag_since is not None:
        old = [model for model in node.models if _is_older(node, model, node.defrag_since)]
        if not old:
            return [*chores, EndDefrag(node=node.name)]
        for model in idle:
            if model in old:
                return [*chores, Recycle(node=node.name, model=model, spec=_spec(node, model, state))]
    return chores


def _idle_unload(node: NodeSnapshot, model: str, state: PlacementState) -> UnloadIdle | None:
    if node.is_pinned(model):
        return None
    profile = state.catalogue.profile(model)
    limit_s = state.policy.idle_unload_s
    if profile is not None and profile.idle_unload_s is not None:
        limit_s = profile.idle_unload_s
    residence = node.residences.get(model)
    if not limit_s or residence is None or residence.since is None:
        return None
    idle_s = state.now - max(state.last_used(node, model), residence.since)
    return UnloadIdle(node=node.name, model=model, idle_s=idle_s) if idle_s >= limit_s else None


def _is_older(node: NodeSnapshot, model: str, moment: float) -> bool:
    """Whether the model was here before `moment`, and can be recycled: what failed or is on its way is left alone."""
    residence = node.residences.get(model)
    since = None if residence is None else residence.since
    return node.status(model) == "loaded" and since is not None and since <= moment


def _spec(node: NodeSnapshot, model: str, state: PlacementState) -> ModelSpec:
    """How the model is here now; where an old neuron does not say, how the catalogue has it."""
    info = node.models[model]
    profile = state.catalogue.profile(model)
    if info.spec is not None or profile is None or node.discovery is None:
        return spec_of(info)
    return msgspec.structs.replace(load_spec(profile, node.discovery), devices=info.devices or None)
