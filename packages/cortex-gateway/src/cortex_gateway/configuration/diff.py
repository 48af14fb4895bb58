"""Difference of two configurations. Pure, and without a secret in what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cortex_gateway.configuration.current import Configuration

NEEDS_RESTART = frozenset(
    (
        "gateway.listen",
        "gateway.metrics_listen",
        "gateway.max_connections",
        "gateway.write_timeout_s",
        "gateway.upstream_connect_timeout_s",
        "gateway.http1_parser",
        "gateway.watchdog_s",
        "entitlements.store",
    )
)
"""Settings of sockets and connections that are there already."""

RELOADED_SECTIONS = frozenset(
    ("gateway", "poll", "routing", "breaker", "eviction", "entitlements", "prompt_filters", "capture", "models_config")
)
"""Whose other settings apply at once. What is in no list is taken to need a restart."""

LISTED = frozenset(("neurons", "entitlements.keys"))
"""Compared by name and not as settings."""


class Names(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of one kind came, went, and is not what it was; each sorted."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        marked = ((("+", self.added)), ("-", self.removed), ("~", self.changed))
        return " ".join(mark + name for mark, names in marked for name in names)


NO_NAMES = Names()


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """settings are dotted keys that apply from now on, reordered the lists whose order counts and changed."""

    neurons: Names = NO_NAMES
    models: Names = NO_NAMES
    aliases: Names = NO_NAMES
    keys: Names = NO_NAMES
    settings: tuple[str, ...] = ()
    reordered: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != NO_DIFFERENCE

    def __str__(self) -> str:
        """One line, such as `neurons +n2 -n1; keys ~alice; settings eviction.strategy`."""
        kinds = (("neurons", self.neurons), ("models", self.models), ("aliases", self.aliases), ("keys", self.keys))
        parts = [f"{kind} {names}" for kind, names in kinds if names]
        if self.settings:
            parts.append(f"settings {' '.join(self.settings)}")
        if self.reordered:
            parts.append(f"another order of {' and '.join(self.reordered)}")
        return "; ".join(parts) if parts else "nothing changed"


NO_DIFFERENCE = Difference()


def difference(before: Configuration, after: Configuration) -> Difference:
    """Nothing exactly where both say the same; the order of models and of keys says nothing."""
    old, new = before.config, after.config
    aliases = list(before.catalogue.aliases), list(after.catalogue.aliases)
    neurons = [entry.name for entry in old.neurons], [entry.name for entry in new.neurons]
    reordered = [
        kind
        for kind, (was, now) in (("neurons", neurons), ("aliases", aliases))
        if _in_common(was, now) != _in_common(now, was)
    ]
    return Difference(
        neurons=_names(_servers(before), _servers(after)),
        models=_names(
            {profile.id: profile for profile in before.catalogue.models},
            {profile.id: profile for profile in after.catalogue.models},
        ),
        aliases=_names(before.catalogue.aliases, after.catalogue.aliases),
        keys=_names(
            {entry.name: entry for entry in old.entitlements.keys},
            {entry.name: entry for entry in new.entitlements.keys},
        ),
        settings=tuple(key for key in _changed_settings(before, after) if not needs_restart(key)),
        reordered=tuple(reordered),
    )


def restart_needed(started_with: Configuration, after: Configuration) -> tuple[str, ...]:
    """Settings of `after` that the running process does not follow."""
    return tuple(key for key in _changed_settings(started_with, after) if needs_restart(key))


def needs_restart(key: str) -> bool:
    return key in NEEDS_RESTART or key.partition(".")[0] not in RELOADED_SECTIONS


def _servers(configuration: Configuration) -> dict[str, object]:
    secrets = configuration.secret_headers
    return {entry.name: (entry, dict(secrets.get(entry.name, {}))) for entry in configuration.config.neurons}


def _names(before: Mapping[str, object], after: Mapping[str, object]) -> Names:
    names = Names(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
    )
    return names if names else NO_NAMES  # that very one, so that it is left out where it is shown


def _in_common(names: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name in known]


def _changed_settings(before: Configuration, after: Configuration) -> list[str]:
    was, now = dict(settings_of(before.config)), dict(settings_of(after.config))
    return sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))


def settings_of(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its dotted key, without what is `LISTED`."""
    for field in section.__struct_fields__:
        key, value = f"{prefix}{field}", getattr(section, field)
        if key in LISTED:
            continue
        if isinstance(value, msgspec.Struct):
            yield from settings_of(value, f"{key}.")
        else:
            yield key, value
