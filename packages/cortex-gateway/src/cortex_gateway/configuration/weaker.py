"""Protection that a new configuration would take away. Pure, and without a secret in what it says.

A file that changes is no order: it may be half written, emptied by a full disk, or an older copy. So a change of a
file never takes protection away; whoever wants that says so (`cortex reload`, SIGHUP). The question asked of each part
is the same: is there a request that the old configuration refuses, limits or keeps from somewhere, and the new one does
not? A key that is gone where one is required is refused from then on, which is stricter; one that comes back is held to
what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import msgspec
from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry
from cortex_core.fleet import ModelCost
from cortex_core.gateway_config import NeuronEntry
from cortex_core.hop import PRIORITIES

from cortex_gateway.configuration.current import Configuration
from cortex_gateway.configuration.diff import difference, settings_of

IsWeaker = Callable[[Any, Any], bool]
"""Of the old and the new value of one setting."""


def never(old: Any, new: Any) -> bool:
    """It says how work is done, and nothing of who may have what."""
    return False


def more(old: Any, new: Any) -> bool:
    return bool(new > old)


def less(old: Any, new: Any) -> bool:
    return bool(new < old)


def more_or_none(old: float | None, new: float | None) -> bool:
    """A limit that None lifts."""
    return old is not None and (new is None or new > old)


def switched_on(old: bool, new: bool) -> bool:
    return new and not old


def switched_off(old: bool, new: bool) -> bool:
    return old and not new


def _lost_its_store(old: str, new: str) -> bool:
    """Without a store, its keys and what budgets have used are forgotten."""
    return old != "memory" and new == "memory"


def _more_or_zero(old: float, new: float) -> bool:
    """A limit that 0 lifts."""
    return bool(old and (not new or new > old))


def _leaves_the_loopback(old: str, new: str) -> bool:
    return old.startswith(_LOOPBACK) and not new.startswith(_LOOPBACK)


def _widened(old: tuple[str, ...], new: tuple[str, ...]) -> bool:
    """More names, or more pages, get in."""
    return "*" not in old and not set(new) <= set(old)


_LOOPBACK = ("127.", "localhost:", "[::1]:")

SETTINGS: Mapping[str, IsWeaker] = {
    "gateway.listen": _leaves_the_loopback,
    "gateway.metrics_listen": _leaves_the_loopback,
    "gateway.max_connections": more_or_none,
    "gateway.allowed_hosts": _widened,
    "gateway.allow_origins": _widened,
    "gateway.secret": never,
    "gateway.max_body_bytes": more,
    "gateway.max_body_memory_bytes": more,
    "gateway.body_timeout_s": more,
    "gateway.write_timeout_s": _more_or_zero,
    "gateway.upstream_connect_timeout_s": never,
    "gateway.upstream_idle_timeout_s": never,
    "gateway.stream_silence_s": never,
    "gateway.stream_hold_s": never,
    "gateway.ping_interval_s": never,
    "gateway.load_wait_s": never,
    "gateway.unstreamed_wait_s": never,
    "gateway.show_loading": never,
    "gateway.drain_grace_s": never,
    "gateway.config_watch_s": never,
    "gateway.http1_parser": never,
    "gateway.watchdog_s": _more_or_zero,
    "poll": never,
    "routing": never,
    "breaker": never,
    "eviction": never,
    "entitlements.require_auth": switched_off,
    "entitlements.admin_from_loopback": switched_on,
    "entitlements.store": _lost_its_store,
    "entitlements.key_refresh_s": more,
    "entitlements.reservation_ttl_s": less,
    "entitlements.min_bytes_per_token": more,
    "entitlements.share_prefixes": switched_on,
    "prompt_filters": never,
    "telemetry": never,
    "capture.exchanges": more,
    "capture.exchange_bytes": more,
    "capture.total_bytes": more,
    "models_config": never,
}
"""When another value of a setting is weaker; a section stands for all its settings. Of what is not here any change
counts: nothing is known of it."""

LISTS = ("neurons", "models", "aliases")
"""Sections that may go, but not all that they hold at once."""


MAX_GONE = 10_000


class Gone(msgspec.Struct, frozen=True):
    """Keys and servers that files have lost, as they were, and that may come back: written half at first, perhaps."""

    keys: tuple[KeyEntry, ...] = ()
    neurons: tuple[NeuronEntry, ...] = ()

    def after(self, old: Configuration, new: Configuration) -> Gone:
        """With what was lost from `old` to `new`, and without what is back."""
        keys = {(entry.name, entry.digest) for entry in new.config.entitlements.keys}
        names = {entry.name for entry in new.config.neurons}
        lost = [
            entry for entry in (*self.keys, *old.config.entitlements.keys) if (entry.name, entry.digest) not in keys
        ]
        left = [entry for entry in (*self.neurons, *old.config.neurons) if entry.name not in names]
        return Gone(tuple(lost[-MAX_GONE:]), tuple(left[-MAX_GONE:]))


NOTHING_GONE = Gone()


def weaker(old: Configuration, new: Configuration, gone: Gone = NOTHING_GONE) -> list[str]:
    """What `new` takes away, a line each; empty where it protects at least as much. `weaker(x, x)` is empty.

    gone: what was there before `old` and is compared where it comes back.
    """
    return [
        *_sections(old, new),
        *_lists(old, new),
        *_settings(old, new),
        *_keys(old.config.entitlements, new.config.entitlements, gone.keys),
        *_neurons((*gone.neurons, *old.config.neurons), new.config.neurons),
        *_prices(old, new),
        *_cut(old, new),
    ]


def may_be_unfinished(old: Configuration, new: Configuration) -> bool:
    """Whether a file has another end than before, or a secret has lost or got one: it may still be being written."""
    texts = (old.texts.config, new.texts.config), (old.texts.catalogue, new.texts.catalogue)
    if any(_last_table(was) != _last_table(now) for was, now in texts):
        return True
    for name, headers in old.secret_headers.items():
        found = new.secret_headers.get(name, {})
        for header, was in headers.items():
            now = found.get(header, was)
            if was != now and (was.startswith(now) or now.startswith(was)):
                return True
    return False


_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)


def _last_table(text: str) -> str:
    start = 0
    for found in _TABLE.finditer(text):
        start = found.start()
    return text[start:]


def _cut(old: Configuration, new: Configuration) -> Iterator[str]:
    """Of a file that is the old one without its end, only that whole entries are gone can be meant: half a number is a
    smaller one, and half an entry another one."""
    changes = difference(old, new)
    if _is_beginning(new.texts.config, old.texts.config):
        changed = [f"neurons `{name}`" for name in (*changes.neurons.added, *changes.neurons.changed)]
        changed += [f"keys `{name}`" for name in (*changes.keys.added, *changes.keys.changed)]
        changed += changes.settings
        if changed:
            yield f"cortex.toml has lost its end, and with it a part of {', '.join(changed)}"
    if _is_beginning(new.texts.catalogue, old.texts.catalogue):
        changed = [f"models `{name}`" for name in (*changes.models.added, *changes.models.changed)]
        changed += [f"aliases `{name}`" for name in (*changes.aliases.added, *changes.aliases.changed)]
        if changed:
            yield f"models.toml has lost its end, and with it a part of {', '.join(changed)}"


def _is_beginning(now: str, was: str) -> bool:
    now = now.rstrip()
    return len(now) < len(was.rstrip()) and was.startswith(now)


def _sections(old: Configuration, new: Configuration) -> Iterator[str]:
    for name in sorted(old.sections - new.sections):
        if name not in LISTS:
            yield f"`{name}` is gone"


def _lists(old: Configuration, new: Configuration) -> Iterator[str]:
    for name, was, now in (
        ("neurons", old.config.neurons, new.config.neurons),
        ("models", old.catalogue.models, new.catalogue.models),
        ("aliases", old.catalogue.aliases, new.catalogue.aliases),
    ):
        if was and not now:
            yield f"{name}: all of them are gone"


def _settings(old: Configuration, new: Configuration) -> Iterator[str]:
    was, now = dict(settings_of(old.config)), dict(settings_of(new.config))
    for key in sorted(was.keys() & now.keys()):
        is_weaker = SETTINGS.get(key) or SETTINGS.get(key.partition(".")[0]) or _differs
        if not is_weaker(was[key], now[key]):
            continue
        if key == "entitlements.store":  # whose name holds its password
            yield f"{key}: keys and the use of budgets would not be kept"
        else:
            yield f"{key}: {_shown(was[key])} would become {_shown(now[key])}"


def _differs(old: Any, new: Any) -> bool:
    return bool(old != new)


# ------------------------------------------------------------------------------------------- keys


def _keys(old: EntitlementsSection, new: EntitlementsSection, gone: Iterable[KeyEntry]) -> Iterator[str]:
    if old.keys and not new.keys:
        yield "entitlements.keys: all keys of the file are gone"
        return
    by_name = {entry.name: entry for entry in new.keys}
    by_digest = {entry.digest: entry for entry in new.keys}
    for entry, is_new_loss in chain(((entry, True) for entry in old.keys), ((entry, False) for entry in gone)):
        # What its holder gets now, and whoever has its name.
        heirs = {heir.name: heir for heir in (by_digest.get(entry.digest), by_name.get(entry.name)) if heir is not None}
        for heir in heirs.values():
            yield from _key(entry, heir)
        if not heirs and is_new_loss and not new.require_auth and _is_limited(entry):
            yield f"entitlements.keys `{entry.name}`: is gone, and with `require_auth` off its holder has no limits"


def _is_limited(entry: KeyEntry) -> bool:
    limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent_requests)
    is_last = entry.priority == "low"
    return "*" not in entry.models or bool(entry.all_budgets) or is_last or any(limit is not None for limit in limits)


def _key(old: KeyEntry, new: KeyEntry) -> Iterator[str]:
    where = f"entitlements.keys `{old.name}`"
    if new.admin and not old.admin:
        yield f"{where}: would be an admin key"
    wider = [pattern for pattern in new.models if not any(_covers(known, pattern) for known in old.models)]
    if wider:
        yield f"{where}: models: {' '.join(wider)} would be allowed"
    for limit in ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests"):
        was, now = getattr(old, limit), getattr(new, limit)
        if more_or_none(was, now):
            yield f"{where}: {limit}: {was} would become {_shown(now)}"
    if PRIORITIES[new.priority] > PRIORITIES[old.priority]:
        yield f"{where}: priority: {old.priority} would become {new.priority}"
    budgets = {budget.name: budget for budget in new.all_budgets}
    for budget in old.all_budgets:
        kept = budgets.get(budget.name)
        if kept is None:
            yield f"{where}: the budget {budget.name} is gone"
        elif _cap(kept) > _cap(budget):
            yield f"{where}: the budget {budget.name}: {_cap(budget):g} would become {_cap(kept):g}"
    if old.all_budgets and new.name != old.name:
        yield f"{where}: as `{new.name}` it would have used nothing of its budgets"
    if old.account_id is not None and new.account_id is None and new.account != old.account:
        yield f"{where}: would be an account of its own"


def _cap(budget: Budget) -> float:
    return budget.tokens if budget.tokens is not None else budget.cost_usd or 0.0


_RUN = re.compile(r"[*?]{2,}")


def _covers(known: str, pattern: str) -> bool:
    """Whether `known` allows every name that `pattern` does; where it cannot be told, it does not."""
    if known in ("*", pattern):
        return True
    if "[" in known or "[" in pattern:
        return False
    return _takes(_in_order(known), _in_order(pattern))


def _in_order(pattern: str) -> str:
    """The same pattern with each run of wildcards written in one way: `?` first, one `*` at most."""
    return _RUN.sub(lambda run: "?" * run[0].count("?") + ("*" if "*" in run[0] else ""), pattern)


def _takes(known: str, pattern: str) -> bool:
    """A wildcard of `pattern` stands for names that hold anything there, so only a wildcard of `known` takes it: `*`
    any run of the pattern, `?` one letter or one `?`."""
    reached = {0}
    for letter in known:
        if letter == "*":
            reached = set(range(min(reached, default=len(pattern) + 1), len(pattern) + 1))
        else:
            reached = {
                place + 1
                for place in reached
                if place < len(pattern) and (pattern[place] == letter or (letter == "?" and pattern[place] != "*"))
            }
    return len(pattern) in reached


# ------------------------------------------------------------------------------------------- servers and prices


def _neurons(old: tuple[NeuronEntry, ...], new: tuple[NeuronEntry, ...]) -> Iterator[str]:
    entries = {entry.name: entry for entry in new}
    for entry in old:
        now = entries.get(entry.name)
        if now is None:
            continue
        if entry.kind == "openai" and now.kind == "neuron":
            yield f"neurons `{entry.name}`: would be trusted as a neuron, and told who asks"
        if entry.secret and not now.secret and now.kind == "neuron":
            yield f"neurons `{entry.name}`: would be told the secret of the others"
        added = sorted(_lowered(now.forward_headers) - _lowered(entry.forward_headers))
        if added:
            yield f"neurons `{entry.name}`: forward_headers: {' '.join(added)} of clients would go there"


def _lowered(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _prices(old: Configuration, new: Configuration) -> Iterator[str]:
    """A budget in money counts at the catalogue's prices: what is cheaper there is more for the same budget."""
    section = old.config.entitlements
    in_money = any(budget.cost_usd is not None for entry in section.keys for budget in entry.all_budgets)
    if not in_money and section.store == "memory":
        return
    for profile in old.catalogue.models:
        if profile.cost is not None and _is_cheaper(profile.cost, _cost(new.catalogue, profile.id)):
            yield f"models `{profile.id}`: would be cheaper, and budgets in money larger"


def _cost(catalogue: Catalogue, model: str) -> ModelCost | None:
    profile = catalogue.profile(model)
    return profile.cost if profile is not None else None


def _is_cheaper(old: ModelCost, new: ModelCost | None) -> bool:
    if new is None:
        return any(_rates(old))
    return any(now < was for was, now in zip(_rates(old), _rates(new), strict=True))


def _rates(cost: ModelCost) -> tuple[float, float, float]:
    return cost.input, cost.output, cost.input if cost.cache_read is None else cost.cache_read


def _shown(value: object) -> str:
    return "no limit" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
