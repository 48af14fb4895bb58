"""One trace over real processes: a gateway, a neuron, the demo model, and a collector that hears both."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.fleet_of_neurons import FleetOfNeurons
from tests.e2e.fleet_process import MODEL, call, eventually
from tests.e2e.streams import read_all
from tests.otlp_collector import Collector, Span

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WITHOUT_OPENTELEMETRY = (
    "import sys, runpy\n"
    "class Missing:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.startswith('opentelemetry'):\n"
    "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Missing())\n"
    "program = sys.argv.pop(1)\n"
    "runpy.run_module(program, run_name='__main__', alter_sys=True)\n"
)


def ask(url: str, *, stream: bool) -> bytes:
    body = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "What is 1+1?"}]}
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    status, _, answer = call(url, "POST", "/v1/messages", {**body, "stream": stream}, headers)
    assert status == 200, answer
    return answer


def test_one_trace_goes_through_both_processes_and_a_collector_that_dies_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with Collector() as collector:
        # The standard variables are enough, and they reach the daemons as they reach any other.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        fleet = FleetOfNeurons(tmp_path, num_neurons=1)
        try:
            assert call(fleet.url, "GET", "/admin/fleet?refresh=1")[0] == 200
            ask(fleet.url, stream=True)
            see_one_trace(fleet, collector.trace(TRACE, count=6))
            collector.__exit__(None, None, None)
            answers = [ask(fleet.url, stream=False) for _ in range(12)]
            assert len({json.dumps(json.loads(answer)["content"]) for answer in answers}) == 1
            for daemon in (fleet.gateway, *fleet.neurons):
                eventually(
                    lambda daemon=daemon: "traces:" in "".join(daemon.output),
                    within_s=60,
                    what=f"{daemon.name} says that nobody hears it",
                )
            fleet.gateway.signal(signal.SIGTERM)
            assert fleet.gateway.process.wait(60) == 0
            fleet.neurons[0].signal(signal.SIGTERM)
            assert fleet.neurons[0].process.wait(60) == 0
        finally:
            fleet.stop()


def see_one_trace(fleet: FleetOfNeurons, spans: list[Span]) -> None:
    phases = [span for span in spans if span.kind == "INTERNAL"]
    server, attempt, neuron = (span for span in spans if span.kind != "INTERNAL")
    assert [(span.service, span.kind) for span in (server, attempt, neuron)] == [
        ("cortex-gateway", "SERVER"),
        ("cortex-gateway", "CLIENT"),
        ("neuron", "SERVER"),
    ]
    assert [server.parent_id, attempt.parent_id, neuron.parent_id] == [CALLER, server.span_id, attempt.span_id]
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert {span.parent_id for span in phases} == {neuron.span_id}
    for name in (
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "gen_ai.response.finish_reasons",
        "cortex.request_id",
    ):
        assert server.attributes[name] == neuron.attributes[name]
    # Lines come through pipes, and may come after the spans.
    eventually(lambda: told_of_it(fleet) == 2, within_s=20, what="each daemon has a line of it")


def told_of_it(fleet: FleetOfNeurons) -> int:
    return sum(TRACE in line for daemon in (fleet.gateway, *fleet.neurons) for line in list(daemon.output))


@pytest.mark.full
def test_a_stream_that_outlives_its_neuron_is_one_trace_with_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        fleet = FleetOfNeurons(tmp_path)
        try:
            assert call(fleet.url, "GET", "/admin/fleet?refresh=1")[0] == 200
            body = {"model": MODEL, "stream": True, "ignore_eos": True, "max_tokens": 150, "prompt": "def main():"}
            asyncio.run(
                read_all(fleet.url, [("/v1/completions", body)], lambda: fleet.neurons[0].signal(signal.SIGKILL))
            )
            (server,) = collector.find(lambda span: span.name == "POST /v1/completions" and not span.parent_id)
            spans = collector.trace(server.trace_id, count=7)
            first, second = (span for span in spans if span.kind == "CLIENT")
            assert first.is_error and first.attributes["error.type"] == "broken_stream"
            assert (first.attributes["cortex.node"], second.attributes["cortex.node"]) == ("n0", "n1")
            (neuron,) = (span for span in spans if span.kind == "SERVER" and span.parent_id == second.span_id)
            assert neuron.attributes["cortex.resumed"] is True
            assert server.attributes["cortex.resumes"] == 1 and not server.is_error
            assert server.attributes["gen_ai.usage.output_tokens"] == 150
        finally:
            fleet.stop()


@pytest.mark.parametrize(
    ("program", "arguments", "extra"),
    [
        ("cortex_cli", ["serve", "--config"], "helexa-cortex-gateway[otel]"),
        ("neuron", ["serve", "--port", "0", "--config"], "helexa-neuron[otel]"),
    ],
)
def test_without_the_extra_the_start_says_what_to_install(
    tmp_path: Path, program: str, arguments: list[str], extra: str
) -> None:
    config = tmp_path / "config.toml"
    listen = '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n' if program == "cortex_cli" else ""
    config.write_text(f"{listen}[telemetry]\ntraces = true\n")
    command = [sys.executable, "-c", WITHOUT_OPENTELEMETRY, program, *arguments, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"pip install '{extra}'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
