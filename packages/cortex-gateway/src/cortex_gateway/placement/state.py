"""Everything a decision looks at, in one value: it reads no clock and asks nobody."""

from __future__ import annotations

import msgspec
from cortex_core.catalogue import Catalogue
from cortex_core.gateway_config import BreakerSection

from cortex_gateway.configuration.policy import Policy
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.breaker import Breakers
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex_gateway.placement.decision import HoldReason
from cortex_gateway.placement.queue import WaitingQueue

MAX_DERIVED_RESIDENCE_S = 30.0
"""A model stays at least as long as it took to load, so that swapping takes half of the time at most; up to this."""

NO_BREAKERS = Breakers(BreakerSection(failures=0))
NOBODY = WaitingQueue()


class Standing(msgspec.Struct, frozen=True):
    """Where one model stands. serving: nodes that have it loaded and can serve it; coming: the first on which it is
    loading or recovering, and which of the two."""

    serving: tuple[NodeSnapshot, ...] = ()
    coming: tuple[str, HoldReason] | None = None


class PlacementState(msgspec.Struct, frozen=True):
    """The fleet and its work at `now` (monotonic seconds). The counters in it are read, never changed, by decisions.

    by_hand: an operator asks. No pause after a failed load stands in the way then.
    standings: where each model stands in this snapshot, kept by `router.standing_of` for as long as it is the same.
    """

    snapshot: FleetSnapshot
    catalogue: Catalogue
    activity: Activity
    policy: Policy = Policy()
    now: float = 0.0
    waiting: WaitingQueue = NOBODY
    breakers: Breakers = NO_BREAKERS
    by_hand: bool = False
    standings: dict[str, Standing] = {}

    def load_of(self, node: NodeSnapshot, model: str) -> int:
        """Requests running or queued there: polled plus sent since."""
        return self.activity.load_of(node.name, model, node.loads.get(model))

    def last_used(self, node: NodeSnapshot, model: str) -> float:
        """When the last request was there, of this gateway or, where the neuron says, of any; -inf if unknown."""
        used = self.activity.last_used(node.name, model)
        load = node.loads.get(model)
        if load is not None and load.idle_s is not None:
            used = max(used, node.polled_at - load.idle_s)
        return used

    def stays_until(self, node: NodeSnapshot, model: str) -> float:
        """Until when a model that was just loaded is left where it is."""
        residence = node.residences.get(model)
        if residence is None or residence.since is None:
            return float("-inf")
        stay_s = self.policy.min_residence_s
        if stay_s is None:
            stay_s = min(residence.load_s, MAX_DERIVED_RESIDENCE_S)
        return residence.since + stay_s
