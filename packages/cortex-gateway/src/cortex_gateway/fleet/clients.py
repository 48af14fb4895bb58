"""Clients for the servers of the configuration, by their kind."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from cortex_core.gateway_config import NeuronEntry

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
