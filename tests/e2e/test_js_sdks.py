"""The official JavaScript SDKs of both vendors: `tests/e2e/js` run by Node against two neurons, on the gateway's native
path and translated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.fleet_of_neurons import Daemon
from tests.e2e.fleet_process import MODEL

FOLDER = Path(__file__).parent / "js"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and its locked dependencies."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("js")
    for name in ("package.json", "package-lock.json", "conformance.test.mjs"):
        shutil.copy(FOLDER / name, folder)
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode and re.search(r"ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ETIMEDOUT", installed.stderr):
        pytest.skip("the npm registry cannot be reached")
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_javascript_sdks_are_content(front: Daemon, node: Path) -> None:
    result = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "conformance.test.mjs"],
        cwd=node,
        env={**os.environ, "CORTEX_URL": front.url, "CORTEX_MODEL": MODEL},
        capture_output=True,
        text=True,
        timeout=400,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    passed = re.search(r"^# pass (\d+)$", report, re.MULTILINE)
    assert passed is not None and int(passed[1]) >= 21, report
