"""`cortex demo` as a user types it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

QUESTION = "What is 12+30?"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cortex_cli", "demo", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150)


def test_the_demo_answers_once_and_exits_0() -> None:
    done = demo("--once", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout


def test_the_demo_serves_a_checkpoint_folder(tmp_path: Path) -> None:
    with as_file(files("neuron") / "demo_model") as source:
        shutil.copytree(source, tmp_path / "checkpoint")
    done = demo("--once", QUESTION, "--model", f"file:{tmp_path / 'checkpoint'}")
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout


def test_a_checkpoint_that_is_none_is_named_and_exits_1(tmp_path: Path) -> None:
    done = demo("--once", QUESTION, "--model", f"file:{tmp_path}")
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr
