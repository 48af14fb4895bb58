"""What happens when things end: clients, processes, the service itself."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.fleet_process import MODEL, FleetProcess, call, eventually


@pytest.fixture
def own_fleet() -> Iterator[FleetProcess]:
    """A fleet that the test may break."""
    running = FleetProcess()
    yield running
    running.stop()


def body(text: str, **settings: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **settings}


LONG = body("Count from 1 to 60.", stream=True, ignore_eos=True, max_tokens=20_000)


def open_stream(base: str, request: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    parts = urlsplit(base)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while b'"content":"' not in (line := response.readline()) or b'"content":""' in line:
        assert line, "the stream ended before its first text"
    return connection, response


def load_of(fleet: FleetProcess) -> dict[str, Any]:
    loads = {load["id"]: load for load in fleet.get("/health", base=fleet.neuron_url)["models"]}
    return dict(loads.get(MODEL, {"in_flight": 0, "queue_depth": 0}))


def engine_pids() -> set[int]:
    """Processes of `neuron.engine.worker` below this test run."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"neuron.engine.worker" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("base", ["gateway", "neuron"])
def test_a_client_that_hangs_up_stops_its_generation(fleet: FleetProcess, base: str) -> None:
    connection, response = open_stream(fleet.url if base == "gateway" else fleet.neuron_url, LONG)
    assert load_of(fleet)["in_flight"] == 1
    response.close()
    connection.close()
    eventually(lambda: load_of(fleet)["in_flight"] == 0, within_s=10, what="the generation stopped")


def test_a_waiting_client_that_hangs_up_stops_its_generation(fleet: FleetProcess) -> None:
    parts = urlsplit(fleet.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    request = {**LONG, "stream": False}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"content-type": "application/json"})
    eventually(lambda: load_of(fleet)["in_flight"] == 1, within_s=10, what="the request is in flight")
    connection.close()
    eventually(lambda: load_of(fleet)["in_flight"] == 0, within_s=10, what="the generation stopped")


def test_an_unloaded_model_comes_back_on_demand_with_one_load(fleet: FleetProcess) -> None:
    status, _, answer = call(fleet.url, "POST", "/admin/models/unload", {"model": MODEL})
    assert status == 200, answer
    assert MODEL not in [model["id"] for model in fleet.get("/models", base=fleet.neuron_url)]
    answers: list[tuple[int, bytes]] = []

    def ask() -> None:
        got, _, text = call(fleet.url, "POST", "/v1/chat/completions", body("What is 12+30?", max_tokens=40))
        answers.append((got, text))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got == 200 and b"42" in text for got, text in answers), answers
    assert len(engine_pids_of(fleet)) == 1


def engine_pids_of(fleet: FleetProcess) -> set[int]:
    """Engine processes that descend from this fleet's demo process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue

    def descends(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == fleet.process.pid:
                return True
        return False

    return {pid for pid in engine_pids() if descends(pid)}


def texts_of(response: http.client.HTTPResponse, *, on_first: Callable[[], None]) -> str:
    """The whole text of a stream, which must be complete; on_first is called after its first piece."""
    text, lines = "", []
    while line := response.readline():
        lines.append(line)
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if piece and not text:
                on_first()
            text += piece
    assert b"data: [DONE]\n" in lines, lines[-5:]
    return text


def test_a_killed_engine_costs_its_streams_a_pause_and_no_token(own_fleet: FleetProcess) -> None:
    request = body("Count from 1 to 60.", stream=True, max_tokens=400, temperature=0)
    parts = urlsplit(own_fleet.url)
    (pid,) = engine_pids_of(own_fleet)

    def answer(on_first: Callable[[], None]) -> str:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(request), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        text = texts_of(response, on_first=on_first)
        connection.close()
        return text

    undisturbed = answer(lambda: None)
    assert answer(lambda: os.kill(pid, signal.SIGKILL)) == undisturbed
    (successor,) = engine_pids_of(own_fleet)
    assert successor != pid
    eventually(lambda: load_of(own_fleet)["in_flight"] == 0, within_s=10, what="nothing is in flight")


def test_a_request_that_comes_while_the_engine_is_rebuilt_waits_for_it(own_fleet: FleetProcess) -> None:
    (pid,) = engine_pids_of(own_fleet)
    os.kill(pid, signal.SIGKILL)
    status, _, answer = call(own_fleet.url, "POST", "/v1/chat/completions", body("What is 12+30?", max_tokens=40))
    assert status == 200 and b"42" in answer, answer


def test_sigterm_lets_streams_end_and_exits_0(own_fleet: FleetProcess) -> None:
    finite = body("Count from 1 to 30.", stream=True, max_tokens=200)
    connection, response = open_stream(own_fleet.url, finite)
    own_fleet.terminate()
    rest = response.read()
    connection.close()
    assert rest.rstrip().endswith(b"data: [DONE]"), rest[-300:]
    assert own_fleet.stop() == 0, "".join(own_fleet.output)
    assert not engine_pids_of(own_fleet)
