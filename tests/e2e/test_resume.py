"""Streams outlive their neuron: another one goes on where it was cut off, and no client notices more than a pause."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fleet_of_neurons import FleetOfNeurons
from tests.e2e.streams import comparable, read_all, requests

NUM_STREAMS = 50


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetOfNeurons]:
    # Answers are compared to the bit: on processors where the model is served in bfloat16, that takes this setting.
    neuron = "[engine]\ndeterministic = true\n"
    running = FleetOfNeurons(tmp_path, neuron=neuron, gateway="stream_silence_s = 6\nping_interval_s = 1")
    yield running
    running.stop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGSTOP, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_streams_of_a_neuron_that_is_lost_are_completed_by_the_other(
    fleet: FleetOfNeurons, number: signal.Signals
) -> None:
    asked = requests(NUM_STREAMS)
    undisturbed = asyncio.run(read_all(fleet.url, asked))
    disturbed = asyncio.run(read_all(fleet.url, asked, lambda: fleet.neurons[0].signal(number)))
    for (path, body), before, after in zip(asked, undisturbed, disturbed, strict=True):
        assert comparable(path, after) == comparable(path, before), (path, body)
    assert not any(b"cortex-" in raw for raw in disturbed)
    output = "".join(fleet.gateway.output)
    assert '"resumes":1' in output and '"mixed"' not in output, "both neurons serve the same files alike"
