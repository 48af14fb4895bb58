"""The GPU benchmark runs to its end where there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "sections",
    [("ceilings", "loading"), pytest.param((), marks=pytest.mark.full)],  # the kernels take minutes in the interpreter
    ids=["some", "all"],
)
@pytest.mark.full
def test_dry_run_checks_times_and_writes_its_figures(tmp_path: Path, sections: tuple[str, ...]) -> None:
    report_path = tmp_path / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = ["--sections", *sections] if sections else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--json", str(report_path), *chosen],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())
    assert {"command", "commit", "device", "torch", "triton"} <= report.keys()
    assert {section["outcome"] for section in report["sections"]} == {"done"}
    assert {bar["verdict"] for bar in report["bars"]} == {"not measured"}
    assert [row["case"] for row in report["loading"]] == ["load", "swap"]
    if not sections:
        assert len(report["checks"]) >= 6
        assert all(check["ok"] for check in report["checks"])
        assert all(row["us"] > 0 and row["floor_us"] > 0 for row in report["kernels"])
        (offline,) = report["offline"]
        assert offline["requests"] == 6 and offline["tokens_per_s"] > 0 < offline["floor_tokens_per_s"]
        cases = {(row["case"], row["batch"]) for row in report["models"]}
        assert cases == {("decode", 1), ("decode", 4), ("prefill", 1)}
        assert all(row["ratio_to_peer"] > 0 and row["engine_ms"] > 0 < row["floor_ms"] for row in report["models"])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.usefixtures("bench")
def test_a_section_keeps_what_it_found_before_its_end() -> None:
    from gpu_sections import Sections

    def rows(ending: Exception | None) -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        yield {"row": 2}
        if ending is not None:
            raise ending
        signal.sigtimedwait([], 60)  # until the alarm

    notes: list[str] = []
    written: list[int] = []
    sections = Sections(3600.0, note=notes.append, on_end=lambda: written.append(1))
    found: list[dict[str, Any]] = []
    sections.run("breaks", 60.0, rows(ValueError("no such kernel")), found)
    sections.run("takes long", 0.05, rows(None), found)
    sections.run("is well", 60.0, iter([{"row": 3}]), found)
    assert [row["row"] for row in found] == [1, 2, 1, 2, 3]
    assert [row["outcome"] for row in sections.outcomes] == ["failed", "cut short", "done"]
    assert sections.failed == ["breaks"] and "no such kernel" in notes[0] and len(written) == 3
    late = Sections(0.0, note=notes.append, on_end=lambda: None)
    late.run("never", 60.0, iter([{"row": 4}]), found)
    assert len(found) == 5 and late.outcomes[0]["outcome"] == "not begun"


@pytest.mark.usefixtures("bench")
def test_bars_are_ratios_to_the_floor_of_the_device() -> None:
    from gpu_bars import judge

    def verdicts(ms: float, tokens_per_s: float) -> dict[str, str]:
        report = {
            "models": [{"model": "Qwen3-8B", "case": "decode", "batch": 1, "engine_ms": ms, "floor_ms": 7.1}],
            "offline": [{"model": "Qwen3-8B", "tokens_per_s": tokens_per_s, "floor_tokens_per_s": 6550.0}],
        }
        return {row["bar"]: row["verdict"] for row in judge(report)}

    # Half the bandwidth of the card that the bars were written for: twice the time, half the rate.
    for ms, rate, expected in ((8.5, 5600, "ahead"), (9.7, 4800, "good"), (9.9, 4700, "missed")):
        found = verdicts(ms, rate)
        assert found["Qwen3-8B, batch 1, ms"] == found["Qwen3-8B, offline mix, tokens/s"] == expected
        assert found["load from page cache, s"] == "not measured"
