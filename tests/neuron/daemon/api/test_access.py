"""The neuron's doors, and what is open to a network."""

from __future__ import annotations

from typing import Any

from neuron.daemon.api.access import exposures
from neuron.daemon.common.config import NeuronConfig, ServerSection


def test_O13_a_start_tells_what_is_open_to_a_network() -> None:
    def told(address: str, **server: Any) -> str:
        return "\n".join(exposures(NeuronConfig(server=ServerSection(**server)), address))

    assert told("127.0.0.1") == told("::1") == ""
    assert "server.secret" in told("0.0.0.0") and "server.secret" in told("::")
    assert told("0.0.0.0", secret="env:X") == ""
    assert "`warn`" in told("0.0.0.0", secret="env:X", secret_mode="warn")
    for key in ("allowed_hosts", "allow_origins"):
        assert f"server.{key} holds `*`" in told("127.0.0.1", **{key: ("*",)})
