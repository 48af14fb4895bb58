"""`neuron tp-smoke`, as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def tp_smoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neuron", "tp-smoke", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=380)


def test_two_ranks_on_a_cpu_are_tried_and_reported() -> None:
    done = tp_smoke("--cpu", "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["tp_size"], report["problem"]) == (True, 2, None)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in report["ranks"]}) == 2
    for rank in report["ranks"]:
        assert rank["exit_code"] == 0
        assert {"joined", "collectives", "left in order"} <= set(rank["checks"])
    assert [len(answer) for answer in report["answers"]] == [16, 16, 16]


def test_devices_that_do_not_exist_are_a_failure_with_the_reason() -> None:
    done = tp_smoke("--devices", "98,99")
    assert done.returncode == 1
    assert "status=failed tp_size=2 devices=98,99" in done.stdout
    assert "device 9" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--cpu", "--devices", "0,1"], ["--devices", "0"], ["--devices", "a,b"]])
def test_a_call_that_makes_no_sense_is_a_usage_error(arguments: list[str]) -> None:
    assert tp_smoke(*arguments).returncode == 2
