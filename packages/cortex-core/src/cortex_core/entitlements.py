"""Keys, limits and budgets as data: the `[entitlements]` section of `cortex.toml`, and what a key may carry.

The same `KeyEntry` describes a key in the configuration file and in a store, so that both are checked alike.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Label = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,63}$(?!\\n)")]
"""Ids of keys and accounts: they travel in headers, metrics and log lines. (A bare `$` would let a line feed in.)"""

HASH_PREFIX = "sha256:"
DEFAULT_BUDGET_S = 86_400


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Over which time use is added up.

    kind: `balance` never resets; `fixed` starts anew at each multiple of `seconds` since 1970 (86400: midnight
    UTC); `rolling` counts the last `seconds` seconds at every moment.
    """

    kind: Literal["balance", "fixed", "rolling"] = "balance"
    seconds: Count = DEFAULT_BUDGET_S


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most so many tokens, or so many US dollars at the catalogue's prices, in a window. Exactly one of both."""

    tokens: Count | None = None
    cost_usd: Annotated[float, msgspec.Meta(gt=0)] | None = None
    window: Window = Window()

    @property
    def name(self) -> str:
        """What use is booked under: independent of the cap, so that a cap can be changed without losing count."""
        unit = "cost" if self.tokens is None else "tokens"
        return f"{unit}/{self.window.kind}" + ("" if self.window.kind == "balance" else f"/{self.window.seconds}")


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One API key. What is left out is not limited.

    key_id names the key wherever it shows, account_id whose it is (several keys may share one; neurons are fair
    between accounts); each defaults to the other. hash is `sha256:` and the digest of the secret. key is the
    secret itself and hard_cap with window a token budget: both as the reference system's files have them.
    models are names or patterns (`*`, `?`) of models or aliases. priority is the highest that its requests may have.
    """

    key_id: Label | None = None
    account_id: Label | None = None
    hash: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    key: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    admin: bool = False
    models: tuple[str, ...] = ("*",)
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrent_requests: Count | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    budgets: tuple[Budget, ...] = ()
    hard_cap: Count | None = None
    window: Window = Window()

    @property
    def name(self) -> str:
        return self.key_id or self.account_id or ""

    @property
    def account(self) -> str:
        return self.account_id or self.key_id or ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the secret. Secrets are 256 random bits, so a slow hash would add nothing."""
        if self.hash is not None:
            return bytes.fromhex(self.hash.removeprefix(HASH_PREFIX))
        return hashlib.sha256((self.key or "").encode()).digest()

    @property
    def all_budgets(self) -> tuple[Budget, ...]:
        if self.hard_cap is None:
            return self.budgets
        return (*self.budgets, Budget(tokens=self.hard_cap, window=self.window))

    def faults(self) -> Iterator[str]:
        """What types cannot say. Never holds a secret."""
        if not self.name:
            yield "needs a `key_id` or an `account_id`"
        if (self.hash is None) == (self.key is None):
            yield "needs either `hash` or `key`"
        names = Counter(budget.name for budget in self.all_budgets)
        yield from (f"two budgets are the same: {name}" for name, count in names.items() if count > 1)
        for budget in self.budgets:
            if (budget.tokens is None) == (budget.cost_usd is None):
                yield "a budget needs either `tokens` or `cost_usd`"


class EntitlementsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys, and where their use is kept. Times are seconds.

    store: `memory` (keys of this file; limits, no budgets), `sqlite:PATH`, or `postgresql://…` for several
    gateways. min_bytes_per_token: what a budget reserves for a prompt, see `cortex_gateway.identity.estimate`.
    share_prefixes: whether accounts share what prefix caches hold; else nobody can tell by the time or the
    `cached_tokens` of an answer what another account has asked.
    """

    require_auth: bool = False
    admin_from_loopback: bool = True
    store: Annotated[str, msgspec.Meta(pattern="^(memory|sqlite:.+|postgres(ql)?://.+)$")] = "memory"
    key_refresh_s: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    reservation_ttl_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    min_bytes_per_token: Annotated[float, msgspec.Meta(ge=1)] = 1.0
    share_prefixes: bool = False
    keys: tuple[KeyEntry, ...] = ()


def entitlement_faults(section: EntitlementsSection) -> list[str]:
    """What is wrong with a section beyond its types, one line each; names keys by id or position, never by secret."""
    faults: list[str] = []
    for index, entry in enumerate(section.keys):
        where = f"entitlements.keys[{index}]" + (f" (`{entry.name}`)" if entry.name else "")
        faults.extend(f"{where}: {fault}" for fault in entry.faults())
        if section.store == "memory" and entry.all_budgets:
            faults.append(f"{where}: a budget must outlive a restart: set `entitlements.store`")
    faults.extend(f"entitlements.keys: the id `{name}` is used twice" for name in _twice(section.keys))
    digests = Counter(entry.digest for entry in section.keys if entry.hash or entry.key)
    if any(count > 1 for count in digests.values()):
        faults.append("entitlements.keys: two entries have the same secret")
    return faults


def _twice(entries: Sequence[KeyEntry]) -> list[str]:
    return sorted(name for name, count in Counter(entry.name for entry in entries).items() if name and count > 1)
