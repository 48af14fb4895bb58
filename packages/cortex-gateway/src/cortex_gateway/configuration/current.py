"""The configuration as one value, how it is read, and the one place where the value that applies now is held."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cortex_core.catalogue import Catalogue, parse_catalogue
from cortex_core.config import ConfigError, read_text
from cortex_core.gateway_config import GatewayConfig, parse_gateway_config

from cortex_gateway.configuration.policy import Policy, policy_of
from cortex_gateway.configuration.secret_headers import secret_headers


@dataclass(frozen=True)
class Texts:
    """`cortex.toml` and the catalogue as they were read; they may hold keys in clear, so nothing shows them."""

    config: str = field(default="", repr=False)
    catalogue: str = field(default="", repr=False)


NO_TEXTS = Texts()


@dataclass(frozen=True)
class Configuration:
    """`cortex.toml`, the catalogue it names, and the headers with the secrets of each server by its name.

    has_catalogue_file: the catalogue was read from a file and is not empty for want of one. texts: of the files that it
    was read from.
    """

    config: GatewayConfig
    catalogue: Catalogue
    secret_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    has_catalogue_file: bool = False
    texts: Texts = NO_TEXTS

    @cached_property
    def policy(self) -> Policy:
        return policy_of(self.config.routing, self.config.eviction)

    @cached_property
    def sections(self) -> frozenset[str]:
        """What the files say something about, by its name at their top: `gateway`, `neurons`, `aliases`.

        What is not at its default counts whatever the texts say: it may come from the environment.
        """
        named = {*_top_names(self.texts.config), *_top_names(self.texts.catalogue)}
        for part in (self.config, self.catalogue):
            defaults = type(part)()
            named |= {name for name in part.__struct_fields__ if getattr(part, name) != getattr(defaults, name)}
        return frozenset(named)

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        """What a neuron may call a model (`scheme:org/name`) to its id in the catalogue."""
        return {f"{profile.source}:{profile.id}": profile.id for profile in self.catalogue.models if profile.source}


def with_secrets(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    has_catalogue_file: bool = False,
    texts: Texts = NO_TEXTS,
    environ: Mapping[str, str] = os.environ,
) -> Configuration:
    """Raises `ConfigError` where a secret is not where the configuration says."""
    found: dict[str, Mapping[str, str]] = {}
    faults: list[str] = []
    for entry in config.neurons:
        try:
            found[entry.name] = secret_headers(entry, environ, shared=config.gateway.secret)
        except ConfigError as error:
            faults.extend(fault for fault in error.faults if fault not in faults)
    if faults:
        raise ConfigError(faults)
    return Configuration(config, catalogue, found, has_catalogue_file, texts)


def texts_now(path: Path | str, config: GatewayConfig) -> Texts:
    """What the files hold that `config` was read from, where they can be read."""

    def text_of(file: Path | str) -> str:
        try:
            return read_text(file)
        except ConfigError:
            return ""

    return Texts(text_of(path), text_of(config.models_config))


def read_configuration(path: Path | str, before: Configuration | None = None) -> Configuration:
    """Both files and all secrets, checked as a start checks them.

    before: what applies now. A catalogue that was there then and is not now is a fault: a start takes it for an empty
    one, but a file that vanishes under a running gateway is more often being replaced.

    Raises `ConfigError` with the faults of everything that could be looked at.
    """
    config_text = read_text(path)
    config = parse_gateway_config(config_text, path)
    has_catalogue_file = Path(config.models_config).exists()
    faults: list[str] = []
    if before is not None and before.has_catalogue_file and not has_catalogue_file and _is_named(config, before):
        faults.append(f"{config.models_config}: no such file; to have no catalogue, make it an empty one")
    catalogue, catalogue_text, configuration = Catalogue(), "", None
    try:
        catalogue_text = read_text(config.models_config, required=False)
        catalogue = parse_catalogue(catalogue_text, config.models_config)
    except ConfigError as error:
        faults.extend(error.faults)
    texts = Texts(config_text, catalogue_text)
    try:
        configuration = with_secrets(config, catalogue, has_catalogue_file=has_catalogue_file, texts=texts)
    except ConfigError as error:
        faults.extend(f"{path}: {fault}" for fault in error.faults)
    if faults or configuration is None:
        raise ConfigError(faults)
    return configuration


def _is_named(config: GatewayConfig, before: Configuration) -> bool:
    """Whether the catalogue is one that the file names, and not the default of a file that does not any more."""
    default = GatewayConfig().models_config
    return config.models_config != default or before.config.models_config == default


def _top_names(text: str) -> frozenset[str]:
    try:
        return frozenset(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return frozenset()


class Current:
    """The configuration that applies now. Whoever needs some of it holds this, and no copy of what is in it.

    started_with is what the process began with: some settings apply only to the next one. config, catalogue, policy:
    of `value`.
    """

    __slots__ = ("_value", "catalogue", "config", "policy", "started_with")

    def __init__(self, value: Configuration) -> None:
        self.started_with = value
        self.value = value

    @property
    def value(self) -> Configuration:
        return self._value

    @value.setter
    def value(self, value: Configuration) -> None:
        self._value = value
        self.config: GatewayConfig = value.config
        self.catalogue: Catalogue = value.catalogue
        self.policy: Policy = value.policy
