"""The command line as a process."""

from __future__ import annotations

import subprocess
import sys


def cortex(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cortex_cli", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )
