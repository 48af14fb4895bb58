"""This build and another one side by side, as gateway and neurons, both ways.

    CORTEX_OTHER_BUILD=WORKTREE/.venv/bin/python uv run pytest tests/e2e/test_mixed_builds.py

WORKTREE is a checkout of the other build with an environment of its own (`git worktree add WORKTREE 7d1037b`, and
`uv sync --locked` in it). Without it nothing is run: an environment of another build is more than a test may install.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.fleet_of_neurons import Daemon, FleetOfNeurons
from tests.e2e.fleet_process import MODEL, call, eventually
from tests.e2e.streams import comparable, read_all, requests

HERE = sys.executable
OTHER = os.environ.get("CORTEX_OTHER_BUILD", "")
GATEWAY = "stream_silence_s = 6\nping_interval_s = 1"

pytestmark = [
    pytest.mark.skipif(not OTHER, reason="CORTEX_OTHER_BUILD names no other build; see the head of this file"),
    pytest.mark.timeout(600),
]

SIDES = {
    "a gateway of the other build": (OTHER, HERE, HERE),
    "neurons of the other build": (HERE, OTHER, OTHER),
    "neurons of both, a gateway of this": (HERE, OTHER, HERE),
    "neurons of both, a gateway of the other": (OTHER, HERE, OTHER),
}


@pytest.mark.parametrize("pythons", SIDES.values(), ids=SIDES)
def test_old_and_new_serve_together(tmp_path: Path, pythons: tuple[str, str, str]) -> None:
    fleet = FleetOfNeurons(tmp_path, gateway=GATEWAY, pythons=pythons)
    try:
        question = [{"role": "user", "content": "What is 12+30?"}]
        for path, body in (
            ("/v1/chat/completions", {"messages": question}),
            ("/v1/messages", {"messages": question, "max_tokens": 60}),
            ("/v1/responses", {"input": "What is 12+30?"}),
        ):
            asked = {"model": MODEL, "temperature": 0, **body}
            status, _, answer = call(fleet.url, "POST", path, asked)
            assert status == 200 and b"42" in answer, answer
        for neuron in fleet.neurons:
            status, _, answer = call(fleet.url, "POST", "/admin/models/unload", {"model": MODEL, "node": neuron.name})
            assert status == 200, answer
        status, _, answer = call(fleet.url, "POST", "/v1/chat/completions", {"model": MODEL, "messages": question})
        assert status == 200, answer  # the gateway has one of them load it
        for neuron in fleet.neurons:
            status, _, answer = call(fleet.url, "POST", "/admin/models/load", {"model": MODEL, "node": neuron.name})
            assert status in (200, 202), answer
            eventually(lambda url=neuron.url: fleet.is_loaded(url), within_s=120, what=f"{neuron.name} has it again")
        streams = requests(12)
        undisturbed = asyncio.run(read_all(fleet.url, streams))
        disturbed = asyncio.run(read_all(fleet.url, streams, lambda: fleet.neurons[0].signal(signal.SIGKILL)))
        for (kind, body), before, after in zip(streams, undisturbed, disturbed, strict=True):
            assert comparable(kind, after) == comparable(kind, before), (kind, body)
    finally:
        fleet.stop()


@pytest.mark.parametrize("order", [(OTHER, HERE), (HERE, OTHER)], ids=["upgrade", "downgrade"])
def test_what_a_neuron_has_written_the_other_build_reads(tmp_path: Path, order: tuple[str, str]) -> None:
    """The list of models that it served: the next one loads them by itself."""
    (tmp_path / "neuron.toml").write_text(f'state_dir = "{tmp_path / "state"}"\n')
    arguments = ["neuron", "serve", "--config", str(tmp_path / "neuron.toml"), "--host", "127.0.0.1", "--port", "0"]
    question = {"model": MODEL, "messages": [{"role": "user", "content": "What is 12+30?"}], "temperature": 0}
    for is_first, python in zip((True, False), order, strict=True):
        neuron = Daemon("neuron", arguments, python=python)
        try:
            if is_first:
                status, _, answer = call(neuron.url, "POST", "/models/load", {"model_id": MODEL, "harness": "candle"})
                assert status == 200, answer
            eventually(lambda url=neuron.url: FleetOfNeurons.is_loaded(url), within_s=120, what="it has loaded")
            status, _, answer = call(neuron.url, "POST", "/v1/chat/completions", question)
            assert status == 200 and b"42" in answer, answer
        finally:
            neuron.stop()
