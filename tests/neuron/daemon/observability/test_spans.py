"""What a collector is told of a neuron's requests: phases of one request, under the span that asked for it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from cortex_core.telemetry import TelemetrySection
from neuron.daemon.common.config import EngineSection, NeuronConfig

from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, run_neuron
from tests.otlp_collector import Collector, Span

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "checkpoint")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Collector() as listening:
        yield listening


@pytest.fixture
async def traced(checkpoint: Path, collector: Collector) -> AsyncIterator[RunningNeuron]:
    engine = EngineSection(stable_after_s=0, stop_grace_s=2.0)
    config = msgspec.structs.replace(
        NeuronConfig(engine=engine), telemetry=TelemetrySection(endpoint=collector.url, traces=True)
    )
    async with run_neuron(checkpoint, config=config) as running:
        yield running


async def spans(collector: Collector, count: int) -> dict[str, Span]:
    found = await asyncio.to_thread(collector.trace, TRACE, count=count)
    return {span.name: span for span in found}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_of_its_caller_with_its_phases_in_it(
    traced: RunningNeuron, collector: Collector, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neuron.request")
    request = traced.chat("the moon is made of cheese", stream=stream, temperature=0.5, seed=7, top_k=3, n=2)
    status, _, _ = await traced.post(CHAT, request, HEADERS)
    assert status == 200
    found = await spans(collector, 4)
    server = found[f"POST {CHAT}"]
    assert (server.service, server.kind, server.parent_id, server.is_error) == ("neuron", "SERVER", CALLER, False)
    expected = {
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": traced.model,
        "gen_ai.response.model": traced.model,
        "gen_ai.request.stream": stream,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.output_tokens": 6,
        "cortex.outcome": "ok",
    }
    assert expected.items() <= server.attributes.items()
    assert server.attributes["gen_ai.usage.input_tokens"] > 0
    queue, prefill, decode = (found[name] for name in ("queue", "prefill", "decode"))
    assert {span.parent_id for span in (queue, prefill, decode)} == {server.span_id}
    assert server.begins == queue.begins <= queue.ends == prefill.begins <= prefill.ends == decode.begins
    assert decode.begins <= decode.ends <= server.ends
    assert not any(b"cheese" in span.raw for span in found.values())
    (line,) = [line.getMessage() for line in caplog.records if line.name == "neuron.request"]
    assert f"trace_id={TRACE}" in line


async def test_a_refusal_is_no_error_of_the_neuron(traced: RunningNeuron, collector: Collector) -> None:
    status, _, _ = await traced.post(CHAT, traced.chat(messages=[]), HEADERS)
    assert status == 400
    server = (await spans(collector, 1))[f"POST {CHAT}"]
    assert server.attributes["http.response.status_code"] == 400 and not server.is_error


async def test_a_trace_that_its_caller_leaves_out_is_left_out(traced: RunningNeuron, collector: Collector) -> None:
    await traced.post(CHAT, traced.chat(), {"traceparent": f"00-{TRACE}-{CALLER}-00"})
    await traced.post(CHAT, traced.chat())
    await asyncio.to_thread(collector.find, lambda span: span.kind == "SERVER")
    assert all(span.trace_id != TRACE and span.parent_id != CALLER for span in collector.spans)


async def test_without_telemetry_the_line_names_the_trace_all_the_same(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neuron.request")
    async with run_neuron(checkpoint) as neuron:
        await neuron.post(CHAT, neuron.chat(), HEADERS)
        await neuron.post(CHAT, neuron.chat(), {"traceparent": "00-nonsense"})
    traced, untraced = [line.getMessage() for line in caplog.records if line.name == "neuron.request"]
    assert f"trace_id={TRACE}" in traced and "trace_id" not in untraced


def test_without_telemetry_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, neuron.daemon.server, neuron.daemon.api.app\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
