"""Choice among several nodes that serve a model. Pure.

score = matched share of the prompt − β × relative load − what suspicion costs. Without a match that is: the least
loaded. Ties go to the node used longest ago, then by name, so that the same picture always gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cortex_gateway.placement.affinity import Shares
from cortex_gateway.placement.decision import RouteReason

SUSPICION = 0.5
"""A node that missed a poll has to be this much better, in shares of a prompt, than one that did not."""

DEFAULT_CAPACITY = 8
"""Requests a node can take at once, where it does not say."""


class Replica(msgspec.Struct, frozen=True):
    """A node that could serve now. load: requests there, plus recent failures. capacity: those it takes at once."""

    node: str
    load: int
    last_used: float = float("-inf")
    capacity: int = 0
    is_suspect: bool = False


def choose(replicas: Sequence[Replica], shares: Shares, beta: float) -> tuple[Replica, RouteReason]:
    """The best replica of at least one, and what decided."""
    if len(replicas) == 1:
        return replicas[0], "loaded"
    loads = relative_loads(replicas)
    known = shares.by_node
    # Rounded, or the order in which floats were added would break ties.
    ranked = sorted(
        (
            (
                round(known.get(replica.node, 0.0) - beta * load - SUSPICION * replica.is_suspect, 9),
                replica,
            )
            for replica, load in zip(replicas, loads, strict=True)
        ),
        key=lambda scored: (-scored[0], scored[1].load, scored[1].last_used, scored[1].node),
    )
    best = ranked[0][1]
    return best, shares.kind if known.get(best.node, 0.0) > 0 else "loaded"


def relative_loads(replicas: Sequence[Replica]) -> list[float]:
    """(load − mean) / mean, but the mean counts as at least half of what a node takes at once: among nodes that are
    far from full a request more or less is no reason to leave a warm cache."""
    mean = sum(replica.load for replica in replicas) / len(replicas)
    capacity = sum(replica.capacity or DEFAULT_CAPACITY for replica in replicas) / len(replicas)
    unit = max(mean, capacity / 2, 1.0)
    return [(replica.load - mean) / unit for replica in replicas]
