"""What a new configuration changes: computed, named, and without a secret."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.entitlements import EntitlementsSection, KeyEntry
from cortex_core.gateway_config import EvictionSection, GatewayConfig, GatewaySection, NeuronEntry, RoutingSection
from cortex_gateway.configuration.current import Configuration
from cortex_gateway.configuration.diff import (
    LISTED,
    NEEDS_RESTART,
    RELOADED_SECTIONS,
    difference,
    needs_restart,
    restart_needed,
)
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "c", "d"])
SECRET = "sk-very-secret"


def unique(entries: st.SearchStrategy[msgspec.Struct], name: str) -> st.SearchStrategy[tuple[msgspec.Struct, ...]]:
    return st.lists(entries, max_size=4, unique_by=lambda entry: getattr(entry, name)).map(tuple)


neurons = st.builds(
    NeuronEntry,
    name=NAMES,
    endpoint=st.sampled_from(["http://one", "http://two"]),
    kind=st.sampled_from(["neuron", "openai"]),
    extensions=st.booleans(),
)
keys = st.builds(
    KeyEntry,
    key_id=NAMES,
    key=st.sampled_from([SECRET, SECRET + "2"]),
    max_concurrent_requests=st.sampled_from([None, 1, 2]),
)
configs = st.builds(
    GatewayConfig,
    gateway=st.builds(GatewaySection, listen=st.sampled_from(["a:1", "b:2"]), load_wait_s=st.sampled_from([1.0, 2.0])),
    routing=st.builds(RoutingSection, affinity=st.booleans()),
    eviction=st.builds(EvictionSection, strategy=st.sampled_from(["lru", "priority"])),
    entitlements=st.builds(
        EntitlementsSection,
        require_auth=st.booleans(),
        store=st.sampled_from(["memory", f"postgresql://u:{SECRET}@db/x"]),
        keys=unique(keys, "name"),
    ),
    neurons=unique(neurons, "name"),
)
catalogues = st.builds(
    Catalogue,
    models=unique(st.builds(ModelProfile, id=NAMES, vram_mb=st.sampled_from([1, 2])), "id"),
    aliases=st.dictionaries(st.sampled_from(["x", "y*", "z"]), NAMES),
)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    config = draw(configs)
    secrets = {entry.name: {"authorization": draw(st.sampled_from([SECRET, "other"]))} for entry in config.neurons}
    return Configuration(config, draw(catalogues), secrets)


def meaning(value: Configuration) -> object:
    """Everything that a gateway follows while it runs. The order of models and of keys says nothing."""
    config = msgspec.to_builtins(value.config)
    config["entitlements"]["keys"] = sorted(config["entitlements"]["keys"], key=str)
    for key in NEEDS_RESTART:
        section, name = key.split(".")
        del config[section][name]
    models = sorted(msgspec.to_builtins(value.catalogue.models), key=str)
    return config, models, list(value.catalogue.aliases.items()), value.secret_headers


@given(configurations(), configurations())
def test_nothing_has_changed_exactly_where_both_mean_the_same(before: Configuration, after: Configuration) -> None:
    assert not difference(before, before)
    assert bool(difference(before, after)) == (meaning(before) != meaning(after))


@given(configurations(), configurations())
def test_the_difference_leads_from_one_to_the_other_and_back(before: Configuration, after: Configuration) -> None:
    found, back = difference(before, after), difference(after, before)
    for names, reverse, old, new in (
        (found.neurons, back.neurons, before.config.neurons, after.config.neurons),
        (found.models, back.models, before.catalogue.models, after.catalogue.models),
        (found.keys, back.keys, before.config.entitlements.keys, after.config.entitlements.keys),
    ):
        was, now = ({getattr(entry, "id", None) or entry.name for entry in entries} for entries in (old, new))  # type: ignore[attr-defined]
        assert (was - set(names.removed)) | set(names.added) == now
        assert set(names.changed) <= was & now
        assert (names.added, names.removed, names.changed) == (reverse.removed, reverse.added, reverse.changed)
    assert found.settings == back.settings


@given(configurations(), configurations())
def test_what_is_said_of_it_is_one_line_without_a_secret(before: Configuration, after: Configuration) -> None:
    found = difference(before, after)
    for text in (str(found), repr(found), repr(after.secret_headers and Configuration(GatewayConfig(), Catalogue()))):
        assert SECRET not in text and "\n" not in text
    assert SECRET not in " ".join(restart_needed(before, after))
    assert SECRET not in repr(msgspec.to_builtins(found))


@given(configurations(), configurations())
def test_a_restart_is_asked_for_by_what_needs_one_and_by_nothing_else(
    before: Configuration, after: Configuration
) -> None:
    asked = restart_needed(before, after)
    assert set(asked) <= NEEDS_RESTART
    assert ("gateway.listen" in asked) == (before.config.gateway.listen != after.config.gateway.listen)
    assert not set(asked) & set(difference(before, after).settings)


def leaves(type_: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(type_):
        key = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from leaves(field.type, key + ".")
        elif key not in LISTED:
            yield key


def test_each_key_is_known_to_apply_or_to_need_a_restart() -> None:
    known = set(leaves(GatewayConfig))
    assert known >= NEEDS_RESTART
    assert {key.partition(".")[0] for key in known} >= RELOADED_SECTIONS
    assert {key for key in known if needs_restart(key)} >= NEEDS_RESTART
    assert needs_restart("a_section_of_tomorrow.key")


def test_the_line_names_everything() -> None:
    before = Configuration(
        GatewayConfig(
            neurons=(NeuronEntry(name="n0", endpoint="http://x"), NeuronEntry(name="n1", endpoint="http://x")),
            entitlements=EntitlementsSection(keys=(KeyEntry(key_id="bob", key="1"), KeyEntry(key_id="al", key="2"))),
        ),
        Catalogue(models=(ModelProfile(id="m/a"),), aliases={"a*": "m/a", "b*": "m/a"}),
        {"n0": {}, "n1": {}},
    )
    after = Configuration(
        GatewayConfig(
            neurons=(NeuronEntry(name="n2", endpoint="http://x"), NeuronEntry(name="n1", endpoint="http://y")),
            entitlements=EntitlementsSection(keys=(KeyEntry(key_id="al", key="3"),)),
            eviction=EvictionSection(strategy="priority"),
        ),
        Catalogue(models=(ModelProfile(id="m/b"),), aliases={"b*": "m/a", "a*": "m/a"}),
        {"n1": {}, "n2": {}},
    )
    assert str(difference(before, after)) == (
        "neurons +n2 -n0 ~n1; models +m/b -m/a; keys -bob ~al; settings eviction.strategy; another order of aliases"
    )
    assert str(difference(before, before)) == "nothing changed"
