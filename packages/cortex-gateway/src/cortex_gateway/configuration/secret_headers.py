"""Headers with secrets, that go to one server of the configuration and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from cortex_core.config import ConfigError
from cortex_core.fleet_secret import SecretReferences, header_value, resolve_secrets
from cortex_core.gateway_config import NeuronEntry
from cortex_core.hop import SECRET_HEADER
from cortex_core.secret_references import resolve_secret


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
