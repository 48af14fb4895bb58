"""A request under which a real engine and a real daemon end: two, and no third."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fleet_of_neurons import Daemon, FleetOfNeurons
from .fleet_process import MODEL, call, eventually


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetOfNeurons]:
    """Engines are not rebuilt."""
    running = FleetOfNeurons(tmp_path, neuron="[engine]\nrecovery_attempts = 0\n")
    yield running
    running.stop()


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def daemon_of(neuron: Daemon) -> int:
    """The process that serves, which is its keeper's only child."""
    (daemon,) = children(neuron.process.pid)
    return daemon


def engine_of(neuron: Daemon) -> int:
    (engine,) = [
        pid
        for pid in children(daemon_of(neuron))
        if b"neuron.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return engine


def ask(fleet: FleetOfNeurons, words: str, **fields: Any) -> tuple[int, str]:
    """Status, and the answer in one piece."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": words}], **fields}
    status, _, answer = call(fleet.url, "POST", "/v1/chat/completions", body)
    return status, answer.decode()


def at_work(fleet: FleetOfNeurons, *, but_not: Daemon | None = None) -> Daemon:
    """The neuron that the gateway has given a request to."""

    def found() -> Daemon | None:
        nodes = json.loads(call(fleet.url, "GET", "/admin/fleet")[2])["nodes"]
        for node, neuron in zip(nodes, fleet.neurons, strict=True):
            if neuron is not but_not and any(model["in_flight"] for model in node["models"]):
                return neuron
        return None

    neuron: Daemon = eventually(found, within_s=60, what="a neuron is at work")
    return neuron


def test_H2_an_engine_and_a_daemon_that_end_under_one_request_are_the_last(fleet: FleetOfNeurons) -> None:
    deadly = {"max_tokens": 20_000, "ignore_eos": True, "temperature": 0}
    answers: list[tuple[int, str]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(fleet, "Count from 1 to 60.", **deadly)))
    asking.start()
    first = at_work(fleet)
    os.kill(engine_of(first), signal.SIGKILL)  # its daemon lives on, and says what became of the request
    second = at_work(fleet, but_not=first)
    os.kill(daemon_of(second), signal.SIGKILL)  # this one says nothing
    asking.join(60)
    answers.append(ask(fleet, "Count from 1 to 60.", **deadly))  # and nobody is asked when the client comes again
    for status, answer in answers:
        assert status == 400 and '"code":"request_kills_engine"' in answer, answer
    status, answer = ask(fleet, "Count from 1 to 61.", max_tokens=5)
    assert "request_kills_engine" not in answer, "another one is at most told that there is no engine yet"
    assert status in (200, 503)
