"""The record of one request: measured as it goes, told once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.events import Usage
from cortex_core.serving.log_lines import REQUESTS_BURST, RequestLines
from cortex_core.trace_context import TraceContext
from neuron.daemon.observability.metrics import Metrics
from neuron.daemon.observability.request_record import RequestRecord
from neuron.daemon.text.prompts import Choice, Prompt
from neuron.protocol import SamplingParams

from tests.neuron.daemon.observability.harness import metrics_of, value

TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", is_sampled=True)


@pytest.fixture
def metrics() -> Metrics:
    return metrics_of()


def record(metrics: Metrics, **more: Any) -> RequestRecord:
    made = RequestRecord(
        metrics, route="chat_completion", path="/v1/chat/completions", request_id="req_1", lines=RequestLines(), **more
    )
    made.found("org/name")
    return made


def choices(*prompt_lens: int, per_prompt: int = 1) -> list[Choice]:
    return [
        Choice(index, Prompt([1] * length, ""), SamplingParams(), 5, ())
        for index, length in enumerate(length for length in prompt_lens for _ in range(per_prompt))
    ]


def line(caplog: pytest.LogCaptureFixture) -> str:
    (only,) = [each for each in caplog.records if each.name == "neuron.request"]
    return only.getMessage()


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neuron.request")


def test_a_prompt_that_choices_share_is_counted_once(metrics: Metrics) -> None:
    made = record(metrics)
    made.prepared(Request("asked", num_choices=2), choices(7, 5, per_prompt=2))
    assert (made.num_choices, made.prompt_tokens, made.asked_model) == (4, 12, "asked")


def test_whatever_happens_a_request_ends_once(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    made = record(metrics)
    made.usage = Usage(7, 5, 2)
    made.end("ok")
    made.end("internal_error", status=500)
    assert " done " in line(caplog) and "outcome=ok" in line(caplog)
    labels = {"model": "org/name", "route": "chat_completion"}
    assert value(metrics, "neuron_requests_total", outcome="ok", **labels) == 1
    assert value(metrics, "neuron_requests_total", outcome="internal_error", **labels) is None


def test_times_are_of_the_first_token_and_between_tokens(metrics: Metrics) -> None:
    made = record(metrics)
    made.seated()
    for num_tokens in (1, 1, 4):
        made.tokens_came(num_tokens)
    made.end("ok")
    assert value(metrics, "neuron_time_to_first_token_seconds_count", model="org/name") == 1
    assert value(metrics, "neuron_inter_token_latency_seconds_count", model="org/name") == 2
    assert made.first_token_s is not None and made.last_token_s is not None
    assert 0 <= made.queue_s <= made.first_token_s <= made.last_token_s  # type: ignore[operator]


@pytest.mark.parametrize(
    ("outcome", "usage", "word", "level"),
    [
        ("ok", Usage(7, 5), "done", logging.INFO),
        ("client_gone", Usage(7, 1), "done", logging.INFO),
        ("queue_full", None, "request rejected", logging.WARNING),
        ("engine_died", Usage(7, 1), "failed", logging.WARNING),
    ],
)
def test_how_it_ended_is_a_word_and_a_level(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, outcome: str, usage: Usage | None, word: str, level: int
) -> None:
    made = record(metrics)
    made.usage = usage
    made.end(outcome)
    assert f": {word} req_id=req_1" in line(caplog) and caplog.records[-1].levelno == level


def test_what_clients_write_cannot_forge_a_line(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    made = record(metrics)
    made.prepared(Request("x\ninjected " + "y" * 500), choices(1))
    made.end("not_found", status=404, detail="no\r\nsuch " + "z" * 1000)
    said = line(caplog)
    assert "\n" not in said and "\r" not in said and len(said) < 900 and "status=404" in said


def test_refusals_in_a_flood_have_no_line_each_and_are_all_counted(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    lines, num_lines = RequestLines(clock=lambda: 5.0), int(REQUESTS_BURST)
    for _ in range(2 * num_lines):
        RequestRecord(metrics, route="r", path="/", request_id="x", lines=lines).end("queue_full")
    assert len(caplog.records) == num_lines
    assert value(metrics, "neuron_requests_total", model="", route="r", outcome="queue_full") == 2 * num_lines
    worked = RequestRecord(metrics, route="r", path="/", request_id="x", lines=lines)
    worked.seated()
    before = len(caplog.records)
    worked.end("queue_full")
    assert len(caplog.records) == before + 1, "what a model worked on has one always"


def test_the_trace_is_that_of_the_caller_or_of_its_spans(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    class Spans:
        def record(self, record: RequestRecord, outcome: str, *, status: int | None, total_s: float) -> str:
            return "f" * 32

    record(metrics, trace=TRACE).end("ok")
    assert f"trace_id={TRACE.trace_id}" in line(caplog)
    caplog.clear()
    record(metrics, trace=TRACE, spans=Spans()).end("ok")
    assert f"trace_id={'f' * 32}" in line(caplog)
