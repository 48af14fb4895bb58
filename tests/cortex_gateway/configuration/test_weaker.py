"""What is weaker: nothing that is the same or tighter, everything that is looser, for each thing that can be."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry, Window
from cortex_core.fleet import ModelCost
from cortex_core.gateway_config import CaptureSection, GatewayConfig, GatewaySection, NeuronEntry
from cortex_gateway.configuration.current import Configuration, Texts
from cortex_gateway.configuration.diff import settings_of
from cortex_gateway.configuration.weaker import NOTHING_GONE, SETTINGS, _covers, may_be_unfinished, weaker
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "c"])
LIMIT = st.none() | st.integers(1, 5)
BUDGETS = st.lists(
    st.builds(
        Budget,
        tokens=st.integers(1, 9),
        window=st.builds(Window, kind=st.sampled_from(["balance", "fixed", "rolling"]), seconds=st.just(60)),
    ),
    max_size=2,
    unique_by=lambda budget: budget.name,
).map(tuple)
KEYS = st.lists(
    st.builds(
        KeyEntry,
        key_id=NAMES,
        account_id=st.none() | st.just("team"),
        admin=st.booleans(),
        models=st.lists(st.sampled_from(["*", "org/*", "org/a", "org/?"]), max_size=2).map(tuple),
        requests_per_minute=LIMIT,
        tokens_per_minute=LIMIT,
        max_concurrent_requests=LIMIT,
        priority=st.sampled_from(["low", "normal", "high"]),
        budgets=BUDGETS,
    ),
    max_size=3,
    unique_by=lambda entry: entry.name,
).map(lambda entries: tuple(msgspec.structs.replace(entry, key=f"secret-{entry.name}") for entry in entries))
NEURONS = st.lists(
    st.builds(
        NeuronEntry,
        name=NAMES,
        endpoint=st.just("http://n"),
        kind=st.sampled_from(["neuron", "openai"]),
        forward_headers=st.lists(st.sampled_from(["X-A", "x-b"]), max_size=2, unique=True).map(tuple),
    ),
    max_size=3,
    unique_by=lambda entry: entry.name,
).map(tuple)
PRICE = st.none() | st.builds(ModelCost, input=st.integers(0, 3).map(float), output=st.integers(0, 3).map(float))
CATALOGUES = st.builds(
    Catalogue,
    models=st.lists(
        st.builds(ModelProfile, id=NAMES, cost=PRICE), max_size=2, unique_by=lambda profile: profile.id
    ).map(tuple),
    aliases=st.dictionaries(st.sampled_from(["x", "y"]), NAMES, max_size=2),
)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    drawn = draw(st.sets(st.sampled_from(["poll", "routing", "breaker", "telemetry"])))
    sections = {"gateway", "entitlements", "capture", *drawn}
    return Configuration(
        GatewayConfig(
            gateway=draw(
                st.builds(
                    GatewaySection,
                    listen=st.sampled_from(["127.0.0.1:1", "0.0.0.0:1"]),
                    max_body_bytes=st.integers(1, 9),
                    body_timeout_s=st.integers(0, 5).map(float),
                    write_timeout_s=st.integers(0, 5).map(float),
                    load_wait_s=st.integers(0, 5).map(float),
                )
            ),
            entitlements=draw(
                st.builds(
                    EntitlementsSection,
                    require_auth=st.booleans(),
                    admin_from_loopback=st.booleans(),
                    store=st.sampled_from(["memory", "sqlite:/keys.db", "postgresql://u:p@h/d"]),
                    key_refresh_s=st.integers(1, 5).map(float),
                    reservation_ttl_s=st.integers(1, 90).map(float),
                    min_bytes_per_token=st.integers(1, 4).map(float),
                    share_prefixes=st.booleans(),
                    keys=KEYS,
                )
            ),
            capture=draw(st.builds(CaptureSection, exchanges=st.integers(0, 5))),
            neurons=draw(NEURONS),
        ),
        draw(CATALOGUES),
        texts=Texts("".join(f"[{name}]\n" for name in sorted(sections))),
    )


def changed(value: Configuration, **parts: Any) -> Configuration:
    """With other parts: of the entitlements, else of the gateway's section, else of the configuration."""
    config = value.config
    for name, part in parts.items():
        if name in EntitlementsSection.__struct_fields__:
            section: Any = msgspec.structs.replace(config.entitlements, **{name: part})
            config = msgspec.structs.replace(config, entitlements=section)
        elif name in GatewaySection.__struct_fields__:
            config = msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, **{name: part}))
        else:
            config = msgspec.structs.replace(config, **{name: part})
    return Configuration(config, value.catalogue, value.secret_headers, value.has_catalogue_file, value.texts)


def with_key(value: Configuration, index: int, **fields: Any) -> Configuration:
    keys = list(value.config.entitlements.keys)
    keys[index % len(keys)] = msgspec.structs.replace(keys[index % len(keys)], **fields)
    return changed(value, keys=tuple(keys))


def key(value: Configuration, index: int) -> KeyEntry:
    keys = value.config.entitlements.keys
    return keys[index % len(keys)]


Step = Callable[[Configuration, int], Configuration | None]
"""One change of a configuration, or None where it has nothing to change."""


def looser_limit(name: str, more: Callable[[int], int | None]) -> Step:
    def step(value: Configuration, index: int) -> Configuration | None:
        if not value.config.entitlements.keys or getattr(key(value, index), name) is None:
            return None
        return with_key(value, index, **{name: more(getattr(key(value, index), name))})

    return step


def of_a_key(change: Callable[[KeyEntry], dict[str, Any] | None]) -> Step:
    def step(value: Configuration, index: int) -> Configuration | None:
        if not value.config.entitlements.keys:
            return None
        fields = change(key(value, index))
        return None if fields is None else with_key(value, index, **fields)

    return step


def of_a_neuron(change: Callable[[NeuronEntry], dict[str, Any] | None]) -> Step:
    def step(value: Configuration, index: int) -> Configuration | None:
        neurons = list(value.config.neurons)
        if not neurons:
            return None
        fields = change(neurons[index % len(neurons)])
        if fields is None:
            return None
        neurons[index % len(neurons)] = msgspec.structs.replace(neurons[index % len(neurons)], **fields)
        return changed(value, neurons=tuple(neurons))

    return step


def without_section(value: Configuration, index: int) -> Configuration | None:
    lines = value.texts.config.splitlines()
    neutral = [line for line in lines if line in ("[poll]", "[routing]", "[breaker]", "[telemetry]")]
    if not neutral:
        return None
    lines.remove(neutral[index % len(neutral)])
    texts = Texts("".join(line + "\n" for line in lines))
    return Configuration(value.config, value.catalogue, value.secret_headers, value.has_catalogue_file, texts)


def with_catalogue(value: Configuration, **parts: Any) -> Configuration:
    catalogue = msgspec.structs.replace(value.catalogue, **parts)
    return Configuration(value.config, catalogue, value.secret_headers, value.has_catalogue_file, value.texts)


def without_an_open_key(value: Configuration, index: int) -> Configuration | None:
    """A limited key that is gone while no key is required."""
    section = value.config.entitlements
    if section.require_auth or len(section.keys) < 2:
        return None
    entry = key(value, index)
    limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent_requests, *entry.budgets)
    if "*" in entry.models and entry.priority != "low" and all(limit is None for limit in limits):
        return None
    return changed(value, keys=tuple(other for other in section.keys if other is not entry))


LOOSER: dict[str, Step] = {
    "require_auth": lambda value, _: (
        changed(value, require_auth=False) if value.config.entitlements.require_auth else None
    ),
    "admin_from_loopback": lambda value, _: (
        None if value.config.entitlements.admin_from_loopback else changed(value, admin_from_loopback=True)
    ),
    "share_prefixes": lambda value, _: (
        None if value.config.entitlements.share_prefixes else changed(value, share_prefixes=True)
    ),
    "store": lambda value, _: None if value.config.entitlements.store == "memory" else changed(value, store="memory"),
    "key_refresh_s": lambda value, n: changed(value, key_refresh_s=value.config.entitlements.key_refresh_s + 1 + n),
    "reservation_ttl_s": lambda value, _: changed(
        value, reservation_ttl_s=value.config.entitlements.reservation_ttl_s / 2
    ),
    "min_bytes_per_token": lambda value, _: changed(value, min_bytes_per_token=9.0),
    "max_body_bytes": lambda value, n: changed(value, max_body_bytes=value.config.gateway.max_body_bytes + 1 + n),
    "max_body_memory_bytes": lambda value, n: changed(
        value, max_body_memory_bytes=value.config.gateway.max_body_memory_bytes + 1 + n
    ),
    "body_timeout_s": lambda value, n: changed(value, body_timeout_s=value.config.gateway.body_timeout_s + 1 + n),
    "write_timeout_s": lambda value, _: (
        changed(value, write_timeout_s=0.0) if value.config.gateway.write_timeout_s else None
    ),
    "listen": lambda value, _: (
        changed(value, listen="0.0.0.0:1") if value.config.gateway.listen.startswith("127.") else None
    ),
    "captures": lambda value, n: changed(
        value, capture=CaptureSection(exchanges=value.config.capture.exchanges + 1 + n)
    ),
    "a section is gone": without_section,
    "no keys": lambda value, _: changed(value, keys=()) if value.config.entitlements.keys else None,
    "no neurons": lambda value, _: changed(value, neurons=()) if value.config.neurons else None,
    "no models": lambda value, _: with_catalogue(value, models=()) if value.catalogue.models else None,
    "no aliases": lambda value, _: with_catalogue(value, aliases={}) if value.catalogue.aliases else None,
    "a limited key is gone where none is required": without_an_open_key,
    "more requests": looser_limit("requests_per_minute", lambda limit: limit + 1),
    "any number of requests": looser_limit("requests_per_minute", lambda limit: None),
    "more tokens": looser_limit("tokens_per_minute", lambda limit: limit + 1),
    "any number of tokens": looser_limit("tokens_per_minute", lambda limit: None),
    "more at once": looser_limit("max_concurrent_requests", lambda limit: limit + 1),
    "any number at once": looser_limit("max_concurrent_requests", lambda limit: None),
    "before others": of_a_key(lambda entry: None if entry.priority == "high" else {"priority": "high"}),
    "no longer behind others": of_a_key(lambda entry: {"priority": "normal"} if entry.priority == "low" else None),
    "admin": of_a_key(lambda entry: None if entry.admin else {"admin": True}),
    "all models": of_a_key(lambda entry: None if "*" in entry.models else {"models": ("*",)}),
    "another model": of_a_key(lambda entry: None if "*" in entry.models else {"models": (*entry.models, "other/b")}),
    "models fall to their default": of_a_key(
        lambda entry: None if "*" in entry.models else {"models": KeyEntry().models}
    ),
    "no budgets": of_a_key(lambda entry: {"budgets": ()} if entry.budgets else None),
    "a larger budget": of_a_key(
        lambda entry: (
            {"budgets": tuple(msgspec.structs.replace(b, tokens=(b.tokens or 0) + 1) for b in entry.budgets)}
            if entry.budgets
            else None
        )
    ),
    "a budget of a shorter window": of_a_key(
        lambda entry: (
            {"budgets": tuple(msgspec.structs.replace(b, window=Window("fixed", 1)) for b in entry.budgets[:1])}
            if entry.budgets
            else None
        )
    ),
    "a key under another name": of_a_key(lambda entry: {"key_id": "d"} if entry.budgets else None),
    "an account of its own": of_a_key(lambda entry: {"account_id": None} if entry.account_id else None),
    "a server is taken for a neuron": of_a_neuron(
        lambda entry: {"kind": "neuron", "forward_headers": ()} if entry.kind == "openai" else None
    ),
    "more of the client's headers": of_a_neuron(lambda entry: {"forward_headers": (*entry.forward_headers, "x-c")}),
}


@given(configurations())
def test_H3_what_is_the_same_is_not_weaker(value: Configuration) -> None:
    assert weaker(value, value) == []
    assert weaker(value, value, NOTHING_GONE.after(value, changed(value, keys=(), neurons=()))) == []


@given(configurations(), st.integers(0, 3))
def test_H3_each_single_step_that_loosens_is_flagged(value: Configuration, index: int) -> None:
    for name, step in LOOSER.items():
        looser = step(value, index)
        if looser is not None:
            found = weaker(value, looser)
            assert found, name
            assert all("\n" not in line and "secret-" not in line and "u:p@h" not in line for line in found)


def lower(limit: int | None) -> int:
    return max(1, (limit or 9) - 1)


TIGHTER: dict[str, Step] = {
    "require_auth": lambda value, _: changed(value, require_auth=True),
    "admin_from_loopback": lambda value, _: changed(value, admin_from_loopback=False),
    "share_prefixes": lambda value, _: changed(value, share_prefixes=False),
    "a store": lambda value, _: (
        changed(value, store="sqlite:/x") if value.config.entitlements.store == "memory" else None
    ),
    "key_refresh_s": lambda value, _: changed(value, key_refresh_s=value.config.entitlements.key_refresh_s / 2),
    "reservation_ttl_s": lambda value, _: changed(value, reservation_ttl_s=999.0),
    "min_bytes_per_token": lambda value, _: changed(value, min_bytes_per_token=1.0),
    "max_body_bytes": lambda value, _: changed(value, max_body_bytes=1),
    "body_timeout_s": lambda value, _: changed(value, body_timeout_s=0.0),
    "listen": lambda value, _: changed(value, listen="127.0.0.1:1"),
    "captures": lambda value, _: changed(value, capture=CaptureSection(exchanges=0)),
    "waits": lambda value, n: changed(value, load_wait_s=float(n), stream_hold_s=float(n)),
    "a new key": lambda value, _: changed(
        value, keys=(*value.config.entitlements.keys, KeyEntry(key_id="new", key="another"))
    ),
    "a key is revoked": lambda value, n: (
        changed(value, keys=tuple(e for e in value.config.entitlements.keys if e is not key(value, n)))
        if value.config.entitlements.require_auth and len(value.config.entitlements.keys) > 1
        else None
    ),
    "a new secret": of_a_key(lambda entry: {"key": "rotated"}),
    "requests": of_a_key(lambda entry: {"requests_per_minute": lower(entry.requests_per_minute)}),
    "tokens": of_a_key(lambda entry: {"tokens_per_minute": lower(entry.tokens_per_minute)}),
    "at once": of_a_key(lambda entry: {"max_concurrent_requests": lower(entry.max_concurrent_requests)}),
    "behind others": of_a_key(lambda entry: {"priority": "low"}),
    "no admin": of_a_key(lambda entry: {"admin": False}),
    "fewer models": of_a_key(lambda entry: {"models": entry.models[:1]}),
    "no models": of_a_key(lambda entry: {"models": ()}),
    "one model of them": of_a_key(lambda entry: {"models": ("org/a",)} if "org/*" in entry.models else None),
    "smaller budgets": of_a_key(
        lambda entry: {"budgets": tuple(msgspec.structs.replace(b, tokens=lower(b.tokens)) for b in entry.budgets)}
    ),
    "one budget more": of_a_key(
        lambda entry: {"budgets": (*entry.budgets, Budget(tokens=1, window=Window("rolling", 7)))}
    ),
    "fewer neurons": lambda value, _: (
        changed(value, neurons=value.config.neurons[1:]) if len(value.config.neurons) > 1 else None
    ),
    "another neuron": lambda value, _: changed(
        value, neurons=(*value.config.neurons, NeuronEntry(name="new", endpoint="http://m"))
    ),
    "a neuron elsewhere": of_a_neuron(lambda entry: {"endpoint": "http://elsewhere"}),
    "fewer headers": of_a_neuron(lambda entry: {"forward_headers": entry.forward_headers[1:]}),
    "headers in other letters": of_a_neuron(
        lambda entry: {"forward_headers": tuple(name.upper() for name in entry.forward_headers)}
    ),
    "another alias": lambda value, _: with_catalogue(value, aliases={**value.catalogue.aliases, "z": "a"}),
    "an alias leads elsewhere": lambda value, _: with_catalogue(
        value, aliases=dict.fromkeys(value.catalogue.aliases, "c")
    ),
}


@given(configurations(), st.lists(st.tuples(st.sampled_from(sorted(TIGHTER)), st.integers(0, 3)), max_size=4))
def test_H3_no_steps_that_tighten_are_flagged(value: Configuration, steps: list[tuple[str, int]]) -> None:
    tighter = value
    for name, index in steps:
        # Revoking what was rotated, or what came new, in one go is no single step.
        tighter = TIGHTER[name](tighter, index) or tighter
    assert weaker(value, tighter) == []


@given(configurations(), configurations())
def test_H3_prices_matter_where_budgets_are_in_money(value: Configuration, other: Configuration) -> None:
    cheap = with_catalogue(
        value, models=tuple(msgspec.structs.replace(profile, cost=None) for profile in value.catalogue.models)
    )
    is_priced = any(p.cost is not None and (p.cost.input or p.cost.output) for p in value.catalogue.models)
    has_store = value.config.entitlements.store != "memory"
    assert bool(weaker(value, cheap)) == (is_priced and has_store)  # the keys here have budgets in tokens
    in_money = KeyEntry(key_id="m", key="money", budgets=(Budget(cost_usd=1.0),))
    section = (*value.config.entitlements.keys, in_money)
    assert bool(weaker(changed(value, keys=section), changed(cheap, keys=section))) == is_priced


@given(st.text("ab*?", max_size=4), st.text("ab*?", max_size=4), st.lists(st.text("abc", max_size=4), max_size=30))
def test_H3_a_pattern_that_is_covered_allows_nothing_more(known: str, pattern: str, names: list[str]) -> None:
    if _covers(known, pattern):
        assert all(fnmatch.fnmatchcase(name, known) for name in names if fnmatch.fnmatchcase(name, pattern))
    assert _covers("*", pattern) and _covers(known, known)
    if not any(wildcard in pattern for wildcard in "*?"):
        assert _covers(known, pattern) == fnmatch.fnmatchcase(pattern, known)


def test_H3_what_comes_back_is_held_to_what_it_was() -> None:
    """A file that is written again from its beginning: a key, or a server, is there before the rest of its lines is."""
    limited = KeyEntry(key_id="a", key="secret-a", requests_per_minute=5)
    other = KeyEntry(key_id="b", key="secret-b")
    outside = NeuronEntry(name="n", endpoint="http://n", kind="openai")
    inside = NeuronEntry(name="m", endpoint="http://m")

    def configuration(keys: tuple[KeyEntry, ...], neurons: tuple[NeuronEntry, ...]) -> Configuration:
        section = EntitlementsSection(require_auth=True, keys=keys)
        return Configuration(GatewayConfig(entitlements=section, neurons=neurons), Catalogue())

    whole, cut = configuration((limited, other), (inside, outside)), configuration((other,), (inside,))
    assert weaker(whole, cut) == []
    gone = NOTHING_GONE.after(whole, cut)
    half = configuration((other, KeyEntry(key_id="a", key="secret-a")), (inside, NeuronEntry("n", "http://n")))
    assert weaker(cut, half) == []  # as far as it is remembered only what ran last
    assert len(weaker(cut, half, gone)) == 2
    renamed = configuration((other, KeyEntry(key_id="z", key="secret-a")), (inside,))
    assert len(weaker(cut, renamed, gone)) == 1
    assert weaker(cut, whole, gone) == []
    assert gone.after(cut, whole) == NOTHING_GONE


def test_H3_no_neuron_is_told_the_secret_of_the_others_because_its_own_is_gone() -> None:
    def configuration(*secret: str) -> Configuration:
        entry = NeuronEntry(name="n", endpoint="http://n", secret=secret or None)
        return Configuration(GatewayConfig(neurons=(entry,)), Catalogue())

    own, other, none = configuration("env:OWN"), configuration("env:NEW"), configuration()
    assert weaker(own, none) == ["neurons `n`: would be told the secret of the others"]
    assert weaker(own, other) == weaker(none, own) == []


def test_H3_each_setting_is_known_to_be_a_limit_or_not() -> None:
    """A new one needs an entry in `SETTINGS`: until then any change of it by a file is refused."""
    keys = {key for key, _ in settings_of(GatewayConfig())}
    unknown = {key for key in keys if key not in SETTINGS and key.partition(".")[0] not in SETTINGS}
    assert not unknown
    assert {name for name in SETTINGS if name not in keys} <= {key.partition(".")[0] for key in keys}


def texts(config: str = "", catalogue: str = "", secret: str = "") -> Configuration:
    return Configuration(GatewayConfig(), Catalogue(), {"n": {"authorization": secret}}, texts=Texts(config, catalogue))


def test_H3_a_file_with_another_end_may_be_unfinished() -> None:
    begun, secret = "[a]\nb = 1\n", "Bearer long"
    whole = texts(begun + "[c]\nd = 10\n", "[d]\n", secret)
    for other in (
        texts(begun, "[d]\n", secret),
        texts(begun + "[c]\nd = 1", "[d]\n", secret),
        texts(begun + "[c]\nd = 10\n[[e]]\n", "[d]\n", secret),
        texts(begun + "[c]\nd = 10\n", "", secret),
        texts(begun + "[c]\nd = 10\n", "[d]\n", "Bearer lo"),
    ):
        assert may_be_unfinished(whole, other) and may_be_unfinished(other, whole)
    assert not may_be_unfinished(whole, whole)
    assert not may_be_unfinished(whole, texts("[new]\n" + begun + "[c]\nd = 10\n", "[d]\n", "Bearer another"))


def test_H3_half_a_number_is_no_smaller_one_and_half_an_entry_no_other_one() -> None:
    """Applied, it would make the whole file weaker, and so refused, when it is there again."""

    def with_limit(text: str, limit: int | None) -> Configuration:
        entries = (KeyEntry(key_id="a", key="a"), KeyEntry(key_id="b", key="b", max_concurrent_requests=limit))
        section = EntitlementsSection(require_auth=True, keys=entries)
        return Configuration(GatewayConfig(entitlements=section), Catalogue(), texts=Texts(text))

    whole = with_limit("key a\nkey b\nmax = 64\n", 64)
    assert weaker(whole, with_limit("key a\nkey b\nmax = 6", 6)) == [
        "cortex.toml has lost its end, and with it a part of keys `b`"
    ]
    assert weaker(whole, with_limit("key a\nkey b\nmax = 6\n", 6)) != []  # with a line end behind
    assert weaker(whole, with_limit("key a\nkey b\nmax = 60\n", 60)) == []
    revoked = changed(whole, keys=whole.config.entitlements.keys[:1])
    assert weaker(whole, Configuration(revoked.config, Catalogue(), texts=Texts("key a\n"))) == []


@pytest.mark.parametrize("field", ["allowed_hosts", "allow_origins"])
@pytest.mark.parametrize(
    ("old", "new", "is_weaker"),
    [
        ((), ("a.example",), True),
        (("a.example",), (), False),
        (("a.example", "b.example"), ("b.example",), False),
        (("a.example",), ("*.example",), True),
        (("a.example",), ("*",), True),
        (("*",), ("a.example",), False),
        (("a.example",), ("a.example",), False),
    ],
)
def test_H3_H6_more_names_and_pages_are_weaker(
    field: str, old: tuple[str, ...], new: tuple[str, ...], is_weaker: bool
) -> None:
    was, now = (
        Configuration(GatewayConfig(gateway=GatewaySection(load_wait_s=7, **{field: value})), Catalogue())
        for value in (old, new)
    )
    assert bool(weaker(was, now)) == is_weaker
