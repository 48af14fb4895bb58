"""When traces are on, what is missing then, and how seldom a collector that is away is spoken of."""

from __future__ import annotations

import logging

import pytest
from cortex_core.telemetry import SeldomHandler, TelemetrySection, traces_are_on

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("section", "environ", "expected"),
    [
        (TelemetrySection(), {}, False),
        (TelemetrySection(traces=True), {}, True),
        (TelemetrySection(endpoint="http://collector:4318"), {}, True),
        (TelemetrySection(traces=False, endpoint="http://collector:4318"), {}, False),
        (TelemetrySection(), ENDPOINT, True),
        (TelemetrySection(), {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (TelemetrySection(traces=False), ENDPOINT, False),
        (TelemetrySection(), {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (TelemetrySection(), {"OTEL_TRACES_EXPORTER": "console, otlp"}, True),
        (TelemetrySection(), {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        (TelemetrySection(traces=True), {"OTEL_SDK_DISABLED": "TRUE"}, False),
        (TelemetrySection(), {"OTEL_SERVICE_NAME": "cortex"}, False),
    ],
)
def test_the_file_decides_then_the_environment(
    section: TelemetrySection, environ: dict[str, str], expected: bool
) -> None:
    assert traces_are_on(section, environ) is expected


def test_many_faults_are_one_line_that_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("opentelemetry.x", logging.WARNING, "", 0, "no %s", ("answer",), None)
    handler = SeldomHandler(interval_s=3600)
    for _ in range(5):
        handler.emit(record)
    assert [line.getMessage() for line in caplog.records] == ["traces: no answer"]
    impatient = SeldomHandler(interval_s=0)
    impatient.emit(record)
    impatient.emit(record)
    assert len(caplog.records) == 3
