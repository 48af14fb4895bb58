"""What a person sees of a fleet: every fact that needs a look, whatever texts others put into it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cortex_cli.commands.top import _span, view
from rich.console import Console


def node(name: str, **fields: Any) -> dict[str, Any]:
    known = {"health": "healthy", "models": [], "devices": [], "discovery": None, "polled_s_ago": 1.0}
    return {"name": name, **known, **fields}


def model(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "status": "loaded", "in_flight": 0, "breaker": "closed", "load": None, **fields}


def shown(*nodes: dict[str, Any], width: int = 200, **fleet: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view({"nodes": list(nodes), "in_flight": 0, "waiting": [], **fleet}, "http://gateway"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, *words: str) -> str:
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


def test_devices_have_a_row_each() -> None:
    devices = [
        {"index": index, "vram_used_mb": 20_480, "vram_free_mb": 4_096, "utilization_pct": 97, "temp_c": 71}
        for index in (0, 1)
    ]
    discovery = {"devices": [{"index": index, "name": f"GPU-{index}"} for index in (0, 1)]}
    text = shown(node("gpu", devices=devices, discovery=discovery, uptime_secs=90_061))
    assert "20.0 of 24.0" in row(text, "gpu", "0 GPU-0", "97 %", "71 °C", "1d 1h")
    assert "gpu" not in row(text, "1 GPU-1")


def test_a_model_shows_its_load_and_what_is_wrong_with_it() -> None:
    load = {"in_flight": 5, "max_in_flight": 8, "queue_depth": 3, "kv_budget_mb": 100, "kv_available_mb": 25}
    load |= {"tok_s_prefill": 2000.4, "tok_s_decode": 60.0}
    models = [
        model("busy", in_flight=2, load=load, pinned=True),
        model(
            "coming", status="loading", progress={"phase": "weights", "bytes_done": 1, "bytes_total": 4, "eta_s": 75.0}
        ),
        model(
            "broken", breaker="open", servable={"ok": False, "reason": "kv", "detail": "no room"}, error="[oom] on 0"
        ),
    ]
    text = shown(node("n", models=models))
    assert row(text, "busy", "5/8", "75 %", "2000", "60") and "busy on n: pinned" in text
    assert "weights 25 %, 1m 15s left" in row(text, "coming on n")
    assert "breaker open, cannot serve: no room, [oom] on 0" in row(text, "broken on n")


def test_a_fleet_without_troubles_fits_eighty_characters() -> None:
    load = {"in_flight": 50, "max_in_flight": 128, "queue_depth": 13, "kv_budget_mb": 100, "kv_available_mb": 25}
    load |= {"tok_s_prefill": 22000.4, "tok_s_decode": 1060.0}
    devices = [{"index": 0, "vram_used_mb": 70_000, "vram_free_mb": 10_000, "utilization_pct": 100, "temp_c": 71}]
    host = {"devices": [{"index": 0, "name": "NVIDIA H100 80GB HBM3"}]}
    busy = model("Qwen/Qwen3-30B-A3B-Instruct", in_flight=40, load=load)
    text = shown(node("gpu1", devices=devices, discovery=host, models=[busy], uptime_secs=90_061), width=80)
    assert row(text, "Qwen/Qwen3-30B-A3B-Instruct", "gpu1", "40", "50/128", "13", "75 %", "22000", "1060")
    assert row(text, "0 NVIDIA H100 80GB HBM3", "68.4 of 78.1", "100 %", "71 °C")


def test_a_node_that_is_away_says_why_in_its_own_words() -> None:
    text = shown(node("away", health="unhealthy", polled_s_ago=130.0, last_error="[connect] refused [/red]"))
    assert "last seen 2m 10s ago, [connect] refused [/red]" in row(text, "away: ")
    assert "0 of 1 nodes healthy" in text and "no models" in text


def test_the_queue_and_what_was_taken_out() -> None:
    queue = {"model": "[big]", "requests": 4, "waited_s": 12.4}
    text = shown(waiting=[queue], leaving={"old": 2}, in_flight=7)
    assert "7 requests in flight  4 waiting" in text
    assert "4 wait for [big], the first for 12s" in text and "2 go on on old, which was taken out" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0, "0s"), (59.6, "1m"), (61, "1m 1s"), (3600, "1h"), (90_061, "1d 1h")]
)
def test_times(seconds: float | None, text: str) -> None:
    assert _span(seconds) == text
