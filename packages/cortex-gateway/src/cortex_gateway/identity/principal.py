"""A key as the gateway works with it: whose it is, what it may, and what it has under way here."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from datetime import UTC, datetime

from cortex_core.entitlements import Budget, KeyEntry, Window
from cortex_core.errors import invalid
from cortex_core.hop import PRIORITIES, PRIORITY_HEADER

from cortex_gateway.http.asgi import RawHeaders
from cortex_gateway.identity.clock import Clock
from cortex_gateway.identity.estimate import cap_of
from cortex_gateway.identity.windows import Meter, Slots

_PRIORITY = PRIORITY_HEADER.encode()
MINUTE = Window(kind="rolling", seconds=60)


class KeyMeters:
    """What this gateway counts of one key by itself. Outlives a reload of the key's limits."""

    __slots__ = ("in_flight", "requests", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests: Meter | None = None
        self.tokens: Meter | None = None

    def adapt(self, entry: KeyEntry) -> None:
        """Take over changed limits without forgetting what was counted."""
        self.requests = _adapted(self.requests, entry.requests_per_minute)
        self.tokens = _adapted(self.tokens, entry.tokens_per_minute)


class Principal:
    """Who asks: one valid key."""

    __slots__ = (
        "_max_priority",
        "_pattern",
        "account_id",
        "budgets",
        "cache_salt",
        "expires_ms",
        "is_admin",
        "key_id",
        "max_concurrent",
        "meters",
        "upstream_headers",
    )

    def __init__(self, entry: KeyEntry, meters: KeyMeters, expires_ms: int | None = None) -> None:
        self.key_id = entry.name
        self.account_id = entry.account
        self.is_admin = entry.admin
        self.expires_ms = expires_ms
        self.max_concurrent = entry.max_concurrent_requests
        self._max_priority: str = entry.priority
        self.meters = meters
        meters.adapt(entry)
        self.budgets: tuple[tuple[Budget, Slots, int], ...] = tuple(
            (budget, Slots.of(budget.window), cap_of(budget)) for budget in entry.all_budgets
        )
        self._pattern = (
            None
            if "*" in entry.models
            else re.compile("|".join(fnmatch.translate(pattern) for pattern in entry.models) or r"(?!)")
        )
        # Of which the account is not to be read, since it goes into logs and page hashes of other hosts.
        self.cache_salt = hashlib.blake2b(entry.account.encode(), digest_size=16, person=b"cortex-account").hexdigest()
        # What neurons of every generation read, for fair shares between accounts.
        self.upstream_headers = (("x-helexa-account-id", self.account_id), ("x-helexa-key-id", self.key_id))

    def may_use(self, *names: str) -> bool:
        """Whether one of a model's names (as asked for, as resolved) is allowed."""
        return self._pattern is None or any(self._pattern.match(name) for name in names)

    def priority(self, headers: RawHeaders) -> str:
        """What a request asks for, or less. Raises `ApiError` for a word that is none."""
        asked = next((value for name, value in headers if name == _PRIORITY), b"normal").decode("latin-1")
        if asked not in PRIORITIES:
            raise invalid(f"{PRIORITY_HEADER} is one of {', '.join(PRIORITIES)}", param=PRIORITY_HEADER)
        return min(asked, self._max_priority, key=PRIORITIES.__getitem__)

    @property
    def may_use_all(self) -> bool:
        return self._pattern is None

    @property
    def counts_tokens(self) -> bool:
        return self.meters.tokens is not None or bool(self.budgets)


def _adapted(meter: Meter | None, cap: int | None) -> Meter | None:
    if cap is None:
        return None
    if meter is None:
        return Meter(cap, MINUTE)
    meter.cap = cap
    return meter


def limit_headers(principal: Principal, dialect: str, clock: Clock) -> RawHeaders:
    """Where the key stands in its minute, in the words of the dialect. Empty without such limits."""
    headers: RawHeaders = []
    meters = principal.meters
    if meters.requests is None and meters.tokens is None:
        return headers
    now_ms = clock.elapsed_ms()
    for unit, meter in ((b"requests", meters.requests), (b"tokens", meters.tokens)):
        if meter is None:
            continue
        remaining, reset_ms = b"%d" % meter.remaining(now_ms), meter.reset_ms(now_ms)
        if dialect == "anthropic":
            prefix = b"anthropic-ratelimit-" + unit
            headers.append((prefix + b"-limit", b"%d" % meter.cap))
            headers.append((prefix + b"-remaining", remaining))
            headers.append((prefix + b"-reset", timestamp(clock.wall_ms() + reset_ms).encode()))
        else:
            headers.append((b"x-ratelimit-limit-" + unit, b"%d" % meter.cap))
            headers.append((b"x-ratelimit-remaining-" + unit, remaining))
            headers.append((b"x-ratelimit-reset-" + unit, duration(reset_ms).encode()))
    return headers


def duration(milliseconds: int) -> str:
    """As OpenAI writes them: `20ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    tail = f"{seconds + rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{tail}"
    return f"{minutes}m{tail}" if minutes else tail


def timestamp(milliseconds: int) -> str:
    """RFC 3339 in UTC, to the second that is not too early."""
    moment = datetime.fromtimestamp(-(-milliseconds // 1000), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
