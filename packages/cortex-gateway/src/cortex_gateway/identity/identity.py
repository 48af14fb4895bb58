"""Authentication and admission by key: what the relay and the routes talk to.

A request that is admitted gets a `Grant`: its share of every limit of its key, taken before it is dispatched and
settled exactly once when it ends. All limits are taken or none, and between the last check and the taking nothing is
awaited, so that requests that race cannot overshoot a cap together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from cortex_core.entitlements import EntitlementsSection
from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit, ModelCost

from cortex_gateway.identity.bookkeeper import Bookkeeper
from cortex_gateway.identity.clock import SYSTEM_CLOCK, Clock
from cortex_gateway.identity.credentials import digest_of, presented_keys
from cortex_gateway.identity.estimate import (
    NOTHING,
    NOTHING_USED,
    Body,
    Estimate,
    MeteredTokens,
    asked_of,
    estimate_of,
    reserved_amount,
    used_amount,
)
from cortex_gateway.identity.keyring import Keyring, warn_of_plain_keys
from cortex_gateway.identity.principal import Principal
from cortex_gateway.identity.refusals import (
    Reason,
    budget_spent,
    model_not_allowed,
    not_authenticated,
    rate_limited,
    store_out_of_reach,
    too_many_at_once,
)
from cortex_gateway.identity.store import Hold, Refused, Settlement, Share, Store, StoreError

logger = logging.getLogger(__name__)

RawHeaders = Iterable[tuple[bytes, bytes]]


class Grant:
    """What one request holds of its key's limits."""

    __slots__ = ("_cost", "_hold", "_identity", "_is_settled", "_reserved_tokens", "_tokens", "estimate", "principal")

    def __init__(self, identity: Identity, principal: Principal, expected: Estimate, cost: ModelCost | None) -> None:
        self.principal = principal
        self.estimate = expected
        self._identity = identity
        self._cost = cost
        self._hold: Hold | None = None
        self._is_settled = False
        self._tokens = principal.meters.tokens if expected is not NOTHING else None
        self._reserved_tokens = 0
        if self._tokens is not None:
            # Whatever is larger than the limit goes when nothing else does: refusing it for ever helps nobody.
            self._reserved_tokens = min(expected.typical.total, self._tokens.cap)

    def settle(self, usage: MeteredTokens) -> None:
        """Give back what was reserved and book what was used. Only the first call counts; nothing is awaited."""
        if self._is_settled:
            return
        self._is_settled = True
        self.principal.meters.in_flight -= 1
        now_ms = self._identity.clock.elapsed_ms()
        if self._tokens is not None:
            self._tokens.settle(self._reserved_tokens, usage.total, now_ms)
        if self._hold is not None:
            budgets = {budget.name: budget for budget, _, _ in self.principal.budgets}
            shares = tuple(
                share._replace(amount=used_amount(budgets[share.budget], usage, self._cost))
                for share in self._hold.shares
            )
            self._identity.bookkeeper.settle(Settlement(self._hold.hold_id, self._hold.key_id, shares))

    # ------------------------------------------------------------------------------------------ taking

    def take(self) -> None:
        """The limits this gateway counts by itself. Raises `ApiError` 429 and takes nothing, or takes all."""
        principal, meters, now_ms = self.principal, self.principal.meters, self._identity.clock.elapsed_ms()
        if principal.max_concurrent is not None and meters.in_flight >= principal.max_concurrent:
            raise self._identity.refuse(principal, "concurrency", too_many_at_once(principal.max_concurrent))
        if meters.requests is not None and (found := meters.requests.refuses(1, now_ms)) is not None:
            raise self._identity.refuse(principal, "requests", rate_limited("requests", found))
        if self._tokens is not None and (found := self._tokens.refuses(self._reserved_tokens, now_ms)) is not None:
            raise self._identity.refuse(principal, "tokens", rate_limited("tokens", found))
        meters.in_flight += 1
        if meters.requests is not None:
            meters.requests.settle(0, 1, now_ms)
        if self._tokens is not None:
            self._tokens.reserve(self._reserved_tokens)

    async def take_budgets(self) -> None:
        """The limits that live in the store. Raises `ApiError` 429, or 503 where the store cannot be asked."""
        identity, principal = self._identity, self.principal
        shares = tuple(
            Share(budget.name, slots, cap, reserved_amount(budget, self.estimate, self._cost))
            for budget, slots, cap in principal.budgets
        )
        try:
            refused = await identity.bookkeeper.reserve(principal.key_id, shares)
        except StoreError as error:
            logger.error("budgets of key %s cannot be checked: %s", principal.key_id, error)
            raise identity.refuse(principal, "store", store_out_of_reach()) from None
        if isinstance(refused, Refused):
            raise identity.refuse(principal, "budget", budget_spent(refused, principal.budgets))
        self._hold = refused


class Identity:
    """The keys of one gateway and what they may. Belongs to one event loop."""

    def __init__(
        self,
        section: EntitlementsSection,
        store: Store,
        *,
        limit_of: Callable[[str], ContextLimit | None],
        cost_of: Callable[[str], ModelCost | None],
        on_refusal: Callable[[Principal, Reason], None] = lambda principal, reason: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._section = section
        self._store = store
        self._limit_of = limit_of
        self._cost_of = cost_of
        self._on_refusal = on_refusal
        self.clock = clock
        self.is_off = False
        """Nobody is asked who they are: no key is known and none is required."""
        self._keyring = Keyring(
            section.keys,
            store,
            now_ms=clock.wall_ms,
            refresh_s=section.key_refresh_s,
            on_change=self._keys_changed,
        )
        self.bookkeeper = Bookkeeper(store, ttl_s=section.reservation_ttl_s)

    def adopt(self, section: EntitlementsSection) -> None:
        """Other keys and limits from now on. What keys that stay have reserved and used goes on counting, and who has
        been admitted stays so."""
        known = set(self._section.keys)
        self._section = section
        warn_of_plain_keys([entry for entry in section.keys if entry not in known])
        self._keyring.adopt(section.keys, refresh_s=section.key_refresh_s)
        self.bookkeeper.ttl_s = section.reservation_ttl_s

    def _keys_changed(self, principals: Mapping[bytes, Principal]) -> None:
        self.is_off = not self._section.require_auth and not principals

    async def start(self) -> None:
        """Raises `StoreError`: a gateway that cannot know its keys does not begin."""
        warn_of_plain_keys(self._section.keys)
        try:
            await self._store.open()
            await self._keyring.start()
        except StoreError:
            await self._store.close()
            raise
        self.bookkeeper.start()

    async def stop(self) -> None:
        """Writes what is still to be booked."""
        await self._keyring.stop()
        await self.bookkeeper.stop()
        await self._store.close()

    # ------------------------------------------------------------------------------------------ who

    async def authenticate(self, headers: RawHeaders, *, is_required: bool = True) -> Principal | None:
        """None is anonymous: no key, or one that is not ours while none is required (G5, placeholder keys).

        With `is_required=False` the caller decides what an anonymous request may, whatever `require_auth` says.
        Raises `ApiError` 401 where a key is required, 503 where it cannot be known whether one is valid.
        """
        presented = presented_keys(headers)
        principal = self._known(presented)
        if principal is not None:
            return principal
        if presented:
            await self._keyring.look_again()
            principal = self._known(presented)
            if principal is not None:
                return principal
            if self._keyring.is_stale:
                raise store_out_of_reach()
        if is_required and self._section.require_auth:
            raise not_authenticated(was_given=bool(presented))
        return None

    def _known(self, presented: Iterable[bytes]) -> Principal | None:
        for key in presented:
            principal = self._keyring.get(digest_of(key))
            if principal is not None:
                return principal
        return None

    # ------------------------------------------------------------------------------------------ how much

    async def admit(
        self, principal: Principal, asked: str, model: str, body: bytes | Body, *, is_metered: bool
    ) -> Grant:
        """A place within the key's limits, or `ApiError` 403, 429, 503. `is_metered`: the request uses tokens."""
        if not principal.may_use(asked, model):
            raise self.refuse(principal, "model", model_not_allowed(principal.key_id, asked))
        expected, cost = NOTHING, None
        if is_metered and principal.counts_tokens:
            expected = estimate_of(
                asked_of(body) if isinstance(body, bytes) else body.asked(),
                self._limit_of(model),
                min_bytes_per_token=self._section.min_bytes_per_token,
            )
            cost = self._cost_of(model)
        grant = Grant(self, principal, expected, cost)
        grant.take()
        if principal.budgets and is_metered:
            try:
                await grant.take_budgets()
            except BaseException:
                grant.settle(NOTHING_USED)
                raise
        return grant

    def refuse(self, principal: Principal, reason: Reason, error: ApiError) -> ApiError:
        self._on_refusal(principal, reason)
        return error
