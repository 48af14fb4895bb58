"""One fleet for all end-to-end tests that leave it as they found it; tests that break things start their own.

The official SDKs and the shapes of agents meet two neurons: `pair` is a gateway over both, and to `translator` both are
just servers with an OpenAI API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from tests.e2e.fleet_of_neurons import Daemon, neuron_daemon
from tests.e2e.fleet_process import MODEL, FleetProcess, call, eventually


@pytest.fixture(scope="session")
def fleet() -> Iterator[FleetProcess]:
    running = FleetProcess()
    yield running
    assert running.stop() == 0, "".join(running.output)


@pytest.fixture(scope="session")
def neurons(fleet: FleetProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """URLs of the fleet's own neuron and of a second one, both with the demo model."""
    second = neuron_daemon(tmp_path_factory.mktemp("second"), 1)
    yield [fleet.neuron_url, second.url]
    second.stop()


def gateway_over(neurons: list[str], folder: Path, *, kind: str) -> Daemon:
    """A gateway that has found the model on each of them. To a server of the kind `openai` it has a key."""
    (folder / "key").write_text("sk-none\n")
    own = {"neuron": "", "openai": 'api_key = "file:key"\n'}[kind]
    entries = "".join(
        f'[[neurons]]\nname = "n{index}"\nkind = "{kind}"\nendpoint = "{url}{"/v1" if kind == "openai" else ""}"\n{own}'
        for index, url in enumerate(neurons)
    )
    config = folder / "cortex.toml"
    config.write_text(f'[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\nload_wait_s = 30\n{entries}')
    gateway = Daemon(kind, ["cortex_cli", "serve", "--config", str(config)])

    def found() -> bool:
        nodes = json.loads(call(gateway.url, "GET", "/admin/fleet")[2])["nodes"]
        return all((MODEL, "loaded") in [(model["id"], model["status"]) for model in node["models"]] for node in nodes)

    eventually(found, within_s=240, what="the gateway has found the model everywhere")
    return gateway


@pytest.fixture(scope="session")
def pair(neurons: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    gateway = gateway_over(neurons, tmp_path_factory.mktemp("pair"), kind="neuron")
    yield gateway
    gateway.stop()


@pytest.fixture(scope="session")
def translator(neurons: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    gateway = gateway_over(neurons, tmp_path_factory.mktemp("translator"), kind="openai")
    yield gateway
    gateway.stop()


@pytest.fixture(params=["native", "translated"])
def front(request: pytest.FixtureRequest) -> Daemon:
    """A gateway over two neurons: on its native path, and translating in front of servers of OpenAI chat alone."""
    daemon: Daemon = request.getfixturevalue("pair" if request.param == "native" else "translator")
    return daemon


@pytest.fixture(scope="session")
def openai_client(pair: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def anthropic_client(pair: Daemon) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=pair.url, api_key="none", max_retries=0, timeout=120)
