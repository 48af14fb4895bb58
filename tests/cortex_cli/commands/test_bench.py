"""`cortex bench`: what it asks for, what it shows, and how it ends."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from cortex_cli import benchmark
from cortex_cli.benchmark import Plan, Report, Spread
from cortex_cli.commands.bench import bench

SPREAD = Spread(*(number / 1000 for number in (5.0, 4.0, 7.0, 8.0, 9.0, 10.0)))


def report_of(plan: Plan, endpoint: str, **changes: Any) -> Report:
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(Report):
        if field.name in ("plan", "endpoint"):
            continue
        wanted = str(field.type)
        fields[field.name] = SPREAD if "Spread" in wanted else {} if "dict" in wanted else 3
    return Report(plan=plan, endpoint=endpoint, **{**fields, "failed": 0, **changes})


class Run:
    """In place of the benchmark: what it was asked, and what it says."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.plan: Plan | None = None
        self.api_key: str | None = None

    async def __call__(self, endpoint: str, plan: Plan, *, api_key: str | None, on_answer: Any) -> Report:
        self.plan, self.api_key = plan, api_key
        on_answer(None)
        return report_of(plan, endpoint, **self.changes)


def invoke(monkeypatch: pytest.MonkeyPatch, run: Run, *arguments: str, key: str = "") -> Result:
    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    return CliRunner().invoke(bench, ["org/name", "--endpoint", "http://h:1", *arguments])


def test_options_become_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    options = ["-n", "7", "-c", "2", "--rate", "1.5", "--shared-words", "9", "--ignore-eos", "--seed", "4"]
    assert invoke(monkeypatch, run, *options, key="secret").exit_code == 0
    assert run.plan is not None and run.api_key == "secret"
    assert (run.plan.model, run.plan.requests, run.plan.concurrency, run.plan.rate) == ("org/name", 7, 2, 1.5)
    assert (run.plan.shared_words, run.plan.ignore_eos, run.plan.seed) == (9, True, 4)


@pytest.mark.parametrize("options", [["-n", "0"], ["-c", "0"], ["--rate", "0"], ["--shared-words", "-1"], []])
def test_what_makes_no_sense_asks_nobody(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    run = Run()
    assert (invoke(monkeypatch, run, *options).exit_code == 2) is bool(options)
    assert (run.plan is None) is bool(options)


def test_times_are_shown_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = invoke(monkeypatch, Run()).output
    row = next(line for line in shown.splitlines() if "time to first token" in line)
    numbers = [word for word in row.replace("│", " ").split() if word[0].isdigit()]
    assert numbers == ["5.0", "4.0", "7.0", "8.0", "9.0", "10.0"]


def test_any_failure_is_an_exit_code_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, Run(failed=2, errors={"HTTP 503": 2}))
    assert result.exit_code == 1 and "2 failed: HTTP 503" in result.output


def test_json_is_the_report_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, Run(), "--json")
    assert result.exit_code == 0 and json.loads(result.output)["plan"]["model"] == "org/name"
