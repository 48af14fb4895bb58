"""What the metrics page describes is emitted by a fleet that has answered, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.fleet_process import MODEL, FleetProcess, call

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()


def documented(prefix: str) -> set[str]:
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{prefix}_")]
    return {name for row in rows for name in re.findall(rf"`({prefix}_\w+)`", row.split("|")[1])}


def exposed(text: str, prefix: str) -> set[str]:
    """Families by the names a query uses: counters with `_total`, info with `_info`, histograms bare."""
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M):
        if name.startswith(prefix) and not name.endswith("_created"):
            names.add(name if kind != "counter" or name.endswith("_total") else f"{name}_total")
    return names


def test_every_metric_is_documented_and_every_documented_metric_is_exposed(fleet: FleetProcess) -> None:
    body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "What is 1+1?"}], "stream": True}
    status, _, _ = call(fleet.url, "POST", "/v1/chat/completions", body)
    assert status == 200
    gateway = call(fleet.metrics_url, "GET", "/metrics")[2].decode()
    neuron = call(fleet.neuron_url, "GET", "/metrics")[2].decode()
    assert exposed(gateway, "cortex") == documented("cortex")
    assert exposed(neuron, "neuron") == documented("neuron")


def value(text: str, series: str) -> float:
    matches = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(series)]
    return sum(matches)


def test_a_streamed_answer_is_metered_even_when_its_client_asked_for_no_usage(fleet: FleetProcess) -> None:
    def read() -> tuple[float, ...]:
        text = call(fleet.metrics_url, "GET", "/metrics")[2].decode()
        names = (
            "requests_total",
            "prompt_tokens_total",
            "completion_tokens_total",
            "time_to_first_token_seconds_count",
        )
        return tuple(value(text, f"cortex_{name}{{") for name in names)

    before = read()
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Count from 1 to 50."}]}
    for dialect in ("/v1/chat/completions", "/v1/messages"):
        for stream in (True, False):
            status, _, answer = call(fleet.url, "POST", dialect, {**body, "stream": stream})
            assert status == 200 and b"cortex-usage" not in answer
    requests, prompt, completion, first = (after - then for after, then in zip(read(), before, strict=True))
    assert (requests, completion, first) == (4, 36, 4)
    assert prompt > 40
