"""This build and another one side by side, as gateway and neurons, both ways: chat in three dialects, loads, streams
that are resumed, and the list of served models that a neuron leaves to its successor, of the newer or the older build.

    CORTEX_OTHER_BUILD=WORKTREE/.venv/bin uv run pytest tests/e2e/test_mixed_builds.py

WORKTREE is a checkout of the other build with an environment of its own (`git worktree add WORKTREE 7d1037b`, and
`uv sync --locked` in it). Without it nothing is run: an environment of another build is more than a test may install.

`CORTEX_THIS_BUILD` names the environment of this build, where it is not the one of the tests. So wheels meet wheels,
each set in an environment of its own under SCRATCH:

    for side in WORKTREE .; do
        out=$SCRATCH/$(git -C $side rev-parse --short HEAD)
        (cd $side && uv build --all-packages --no-sources --out-dir $out &&
            uv export --locked --no-emit-workspace --no-dev --no-hashes --quiet >$out/locked.txt)
        uv venv $out/venv
        uv pip install --python $out/venv -c $out/locked.txt $out/*.whl
    done
    CORTEX_OTHER_BUILD=$SCRATCH/7d1037b/venv/bin CORTEX_THIS_BUILD=$out/venv/bin \\
        uv run pytest tests/e2e/test_mixed_builds.py
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


def python_of(variable: str, default: str) -> str:
    """The interpreter of the environment whose `bin` folder, or interpreter, the variable names. Raises
    `FileNotFoundError`."""
    named = os.environ.get(variable)
    if not named:
        return default
    path = Path(named).absolute()
    python = path / "python" if path.is_dir() else path
    if not python.exists():
        raise FileNotFoundError(f"{variable}={named}: there is no {python}")
    return str(python)


HERE = python_of("CORTEX_THIS_BUILD", sys.executable)
OTHER = python_of("CORTEX_OTHER_BUILD", "")
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
