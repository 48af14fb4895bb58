"""The client for each server of the configuration, and the secrets that go there and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from cortex_core.config import ConfigError
from cortex_core.fleet_secret import SecretReferences, header_value, resolve_secrets
from cortex_core.gateway_config import NeuronEntry
from cortex_core.hop import SECRET_HEADER
from cortex_core.secret_references import resolve_secret

from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.fleet.openai_server import OpenAIServer


def client_of(session: aiohttp.ClientSession, entry: NeuronEntry, secrets: Mapping[str, str]) -> NeuronClient:
    """The client for a server of the configuration. secrets: its `secret_headers`."""
    if entry.kind == "openai":
        return OpenAIServer(
            session,
            entry.name,
            entry.endpoint,
            secrets,
            extensions=entry.extensions,
            forward_headers=entry.forward_headers,
        )
    return NeuronClient(session, entry.name, entry.endpoint, secrets)


def secret_headers(entry: NeuronEntry, environ: Mapping[str, str], *, shared: SecretReferences = ()) -> dict[str, str]:
    """The headers of a server's configuration with their values. shared: the secret of the fleet, for neurons.

    Raises `ConfigError`, which names no value.
    """
    if entry.kind == "neuron":
        where = "gateway.secret" if entry.secret is None else f"neurons.{entry.name}.secret"
        secrets = resolve_secrets(shared if entry.secret is None else entry.secret, environ, where=where)
        return {SECRET_HEADER: header_value(secrets)} if secrets else {}
    references = dict(entry.headers)
    found: dict[str, str] = {}
    faults: list[str] = []
    if entry.api_key is not None:
        references["authorization"] = entry.api_key
    for name, reference in references.items():
        try:
            value = resolve_secret(reference, environ)
        except ValueError as error:
            faults.append(f"neurons.{entry.name}: {'api_key' if reference is entry.api_key else name}: {error}")
            continue
        found[name] = f"Bearer {value}" if reference is entry.api_key else value
    if faults:
        raise ConfigError(faults)
    return found
