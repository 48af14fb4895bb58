"""A fleet of one: what it is waited for, what it says meanwhile, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cortex_cli import demo_fleet
from cortex_cli.demo_fleet import _METRICS, _READY, DemoFleet, _progress_text
from cortex_cli.exits import CliError

HALF = {"phase": "weights", "bytes_done": 2 * 2**20, "bytes_total": 4 * 2**20}


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("INFO neuron listening on http://127.0.0.1:13131\n", "http://127.0.0.1:13131"),
        ("listening on http://[::1]:80 now", "http://[::1]:80"),
        ("metrics exporter on http://127.0.0.1:9", None),
        ("listening soon", None),
    ],
)
def test_a_daemon_says_where_it_listens(line: str, url: str | None) -> None:
    found = _READY.search(line)
    assert (found[1] if found else None) == url
    assert (_METRICS.search(line) is not None) is ("metrics" in line)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"id": "m", "status": "loading"}, "m: loading"),
        ({"id": "m", "status": "loading", "progress": {"bytes_total": 0}}, "m: loading"),
        ({"id": "m", "status": "loading", "progress": HALF}, "m: weights 50% of 4 MiB"),
    ],
)
def test_how_far_a_load_is_is_said_where_it_is_known(entry: dict[str, Any], text: str) -> None:
    assert _progress_text(entry) == text


class Daemons:
    """Answers of a neuron, one after the other, and of a gateway."""

    def __init__(self, *models: list[dict[str, Any]], failed: list[dict[str, str]] | None = None) -> None:
        self.models = list(models)
        self.failed = failed or []
        self.asked: list[str] = []

    def __call__(self, url: str, *, timeout_s: float) -> Daemons:
        return self

    def get(self, path: str) -> Any:
        self.asked.append(path)
        if path == "/models":
            return self.models.pop(0) if len(self.models) > 1 else self.models[0]
        return {"activation": {"failed": self.failed}}


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[DemoFleet]:
    monkeypatch.setattr(demo_fleet.time, "sleep", lambda seconds: None)
    with DemoFleet(model="org/name") as made:
        yield made


def test_the_gateway_looks_at_once_where_the_model_is_up(fleet: DemoFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its first client sees is then the true catalogue."""
    daemons = Daemons([], [{"id": "hf:org/name", "status": "loading"}], [{"id": "hf:org/name", "status": "loaded"}])
    monkeypatch.setattr(demo_fleet, "Gateway", daemons)
    said: list[str] = []
    fleet._wait_for_model(10, said.append)
    assert fleet.model == "hf:org/name" and said == ["hf:org/name: loading"]
    assert daemons.asked[-1] == "/admin/fleet?refresh=1"


@pytest.mark.parametrize(
    ("daemons", "message"),
    [
        (Daemons([{"id": "m", "status": "failed", "error": "no memory"}]), "loading m failed: no memory"),
        (Daemons([], failed=[{"model_id": "m", "error": "no such model"}]), "loading m failed: no such model"),
    ],
)
def test_a_load_that_fails_is_said_with_its_reason(
    fleet: DemoFleet, monkeypatch: pytest.MonkeyPatch, daemons: Daemons, message: str
) -> None:
    monkeypatch.setattr(demo_fleet, "Gateway", daemons)
    with pytest.raises(CliError, match=message):
        fleet._wait_for_model(10, None)


def test_a_load_that_takes_too_long_is_given_up(fleet: DemoFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_fleet, "Gateway", Daemons([]))
    with pytest.raises(CliError, match="was not loaded within 0 s"):
        fleet._wait_for_model(0, None)


def test_without_the_neuron_the_extra_is_named(fleet: DemoFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_fleet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CliError, match=r"helexa-cortex-cli\[demo\]"):
        fleet.start()


def test_the_gateway_stops_before_the_neuron(fleet: DemoFleet) -> None:
    class Child:
        def __init__(self, name: str) -> None:
            self.name = name

        def stop(self) -> None:
            stopped.append(self.name)

    stopped: list[str] = []
    children: Any = [Child("neuron"), Child("gateway")]
    fleet._children = children
    fleet.stop()
    fleet.stop()
    assert stopped == ["gateway", "neuron"]
