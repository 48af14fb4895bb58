"""The configuration as one value, how it is read, and the one place where the value that applies now is held."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cortex_core.catalogue import Catalogue, load_catalogue
from cortex_core.config import ConfigError
from cortex_core.gateway_config import GatewayConfig, load_gateway_config

from cortex_gateway.fleet.openai_server import secret_headers
from cortex_gateway.placement.situation import Policy, policy_of


@dataclass(frozen=True)
class Configuration:
    """`cortex.toml`, the catalogue it names, and the headers with the secrets of each server by its name.

    has_catalogue_file: the catalogue was read from a file and is not empty for want of one.
    """

    config: GatewayConfig
    catalogue: Catalogue
    secret_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    has_catalogue_file: bool = False

    @cached_property
    def policy(self) -> Policy:
        return policy_of(self.config.routing, self.config.eviction)

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        """What a neuron may call a model (`scheme:org/name`) to its id in the catalogue."""
        return {f"{profile.source}:{profile.id}": profile.id for profile in self.catalogue.models if profile.source}


def with_secrets(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    has_catalogue_file: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Configuration:
    """Raises `ConfigError` where a secret is not where the configuration says."""
    found: dict[str, Mapping[str, str]] = {}
    faults: list[str] = []
    for entry in config.neurons:
        try:
            found[entry.name] = secret_headers(entry, environ)
        except ConfigError as error:
            faults.extend(error.faults)
    if faults:
        raise ConfigError(faults)
    return Configuration(config, catalogue, found, has_catalogue_file)


def read_configuration(path: Path | str, before: Configuration | None = None) -> Configuration:
    """Both files and all secrets, checked as a start checks them.

    before: what applies now. A catalogue that was there then and is not now is a fault: a start takes it for an empty
    one, but a file that vanishes under a running gateway is more often being replaced.

    Raises `ConfigError` with the faults of everything that could be looked at.
    """
    config = load_gateway_config(path)
    has_catalogue_file = Path(config.models_config).exists()
    faults: list[str] = []
    if before is not None and before.has_catalogue_file and not has_catalogue_file:
        faults.append(f"{config.models_config}: no such file; to have no catalogue, make it an empty one")
    catalogue, configuration = Catalogue(), None
    try:
        catalogue = load_catalogue(config.models_config)
    except ConfigError as error:
        faults.extend(error.faults)
    try:
        configuration = with_secrets(config, catalogue, has_catalogue_file=has_catalogue_file)
    except ConfigError as error:
        faults.extend(f"{path}: {fault}" for fault in error.faults)
    if faults or configuration is None:
        raise ConfigError(faults)
    return configuration


class Current:
    """The configuration that applies now. Whoever needs some of it holds this, and no copy of what is in it.

    started_with is what the process began with: some settings apply only to the next one.
    """

    __slots__ = ("started_with", "value")

    def __init__(self, value: Configuration) -> None:
        self.value = value
        self.started_with = value

    @property
    def config(self) -> GatewayConfig:
        return self.value.config

    @property
    def catalogue(self) -> Catalogue:
        return self.value.catalogue

    @property
    def policy(self) -> Policy:
        return self.value.policy
