"""The GPU benchmark runs to its end where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


@pytest.mark.slow
def test_dry_run_checks_times_and_writes_its_figures(tmp_path: Path) -> None:
    report_path = tmp_path / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--json", str(report_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())
    assert {"command", "commit", "device", "torch", "triton"} <= report.keys()
    assert len(report["checks"]) >= 6
    assert all(check["ok"] for check in report["checks"])
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in report["kernels"])
    cases = {(row["case"], row["batch"]) for row in report["models"]}
    assert cases == {("decode", 1), ("decode", 4), ("prefill", 1)}
    assert all(row["ratio_to_peer"] > 0 for row in report["models"])
