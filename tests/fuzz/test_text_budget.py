"""Whatever a request, a template or an answer holds, its text takes no more than its budget: a result or a typed
refusal, in calls and bytes that its size bounds. See `text_budget.py`, which draws, and `hostile_requests.py`.

The long form: `CORTEX_ROUNDS=500 uv run pytest tests/fuzz/test_text_budget.py` (20,000 examples).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NUM_PROCESSES = 2
EXAMPLES_OF_A_PROCESS = 500
EXAMPLES = int(os.environ["CORTEX_ROUNDS"]) * 40 if "CORTEX_ROUNDS" in os.environ else 2_000
SHOWN_CHARACTERS = 2_000


def results_of(seed: int, folder: Path) -> float:
    """How many of a process's examples gave a result. Fails with what was tried last where the process does."""
    trying = folder / f"trying{seed}"
    command = [sys.executable, "-m", "tests.fuzz.text_budget", str(seed), str(EXAMPLES_OF_A_PROCESS), str(trying)]
    environ = {**os.environ, "RUST_BACKTRACE": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=root, env=environ)
    if done.returncode != 0:
        tried = trying.read_bytes()[:SHOWN_CHARACTERS].decode("utf-8", "replace") if trying.exists() else "nothing"
        pytest.fail(f"ended with {done.returncode} at\n{tried}\n{(done.stdout + done.stderr)[-SHOWN_CHARACTERS:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["results"])


@pytest.mark.timeout(0 if "CORTEX_ROUNDS" in os.environ else 600)
def test_H1_H2_H9_no_request_takes_more_than_its_budget_of_text(tmp_path: Path) -> None:
    seeds = range(-(-EXAMPLES // EXAMPLES_OF_A_PROCESS))
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        num_results = sum(pool.map(lambda seed: results_of(seed, tmp_path), seeds))
    assert num_results > EXAMPLES / 3, "most of what is drawn is refused: it shows too little"
