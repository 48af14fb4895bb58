"""The daemon with its real engine and the real demo model: right answers, and nothing held afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import EngineSection, NeuronConfig
from neuron.daemon.hub.sources import DEMO_MODEL, demo_model_path
from neuron.daemon.server import Daemon
from neuron.host_memory import multiplies_bfloat16
from neuron.native_kernels import has_native_kernels

from tests.neuron.daemon.api.harness import RunningNeuron
from tests.neuron.scripted_engine import eventually

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        not (demo_model_path() / "model.safetensors").exists(), reason="this checkout has no trained weights"
    ),
]

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def neuron() -> AsyncIterator[RunningNeuron]:
    engine = EngineSection(num_threads=1, kv_cache_tokens=65_536, stable_after_s=0)
    config = NeuronConfig(host="127.0.0.1", port=0, engine=engine)
    daemon = Daemon(config)
    url = daemon.bind()
    serving = asyncio.create_task(daemon.serve())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as client:
        try:
            await daemon.services.manager.load(ModelSpec(DEMO_MODEL))
            yield RunningNeuron(daemon, url, DEMO_MODEL, client)
        finally:
            daemon.request_stop()
            daemon.request_stop()
            await serving


def ask(neuron: RunningNeuron, text: str, **settings: Any) -> dict[str, Any]:
    return neuron.chat(text, **{"temperature": 0, "max_tokens": 60, **settings})


async def answer_of(neuron: RunningNeuron, text: str, **settings: Any) -> str:
    status, _, body = await neuron.post(CHAT, ask(neuron, text, **settings))
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["message"]["content"])


async def test_it_adds_in_both_dialects(neuron: RunningNeuron) -> None:
    assert "42" in await answer_of(neuron, "What is 12+30?")
    status, _, body = await neuron.post(MESSAGES, ask(neuron, "What is 12+30?"))
    answer = json.loads(body)
    assert status == 200 and "42" in answer["content"][-1]["text"] and answer["stop_reason"] == "end_turn"


async def test_it_says_what_it_is_computed_by(neuron: RunningNeuron) -> None:
    (model,) = await neuron.get("/models")
    assert "threads" in model["computed_by"] and "torch" in model["computed_by"]
    has_kernels = has_native_kernels() and not (model["dtype"] == "bfloat16" and multiplies_bfloat16())
    assert ("native kernels" in model["computed_by"]) == has_kernels


async def test_counting_equals_billing(neuron: RunningNeuron) -> None:
    request = ask(neuron, "How are you?", system="Be brief.")
    _, _, counted = await neuron.post(MESSAGES + "/count_tokens", request)
    _, _, body = await neuron.post(MESSAGES, request)
    usage = json.loads(body)["usage"]
    assert json.loads(counted)["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


async def cached_tokens(neuron: RunningNeuron, route: str, body: dict[str, Any], account: str | None = None) -> int:
    headers = {} if account is None else {"x-cortex-cache-salt": account}
    status, _, answer = await neuron.post(route, body, headers)
    assert status == 200, answer
    usage = json.loads(answer)["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(usage.get("cache_read_input_tokens") or details.get("cached_tokens") or 0)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
async def test_H10_what_one_account_has_asked_is_found_by_no_other(neuron: RunningNeuron, route: str) -> None:
    body = ask(neuron, f"Repeat after me, {route}: " + "a long and secret story. " * 12, max_tokens=1)
    assert await cached_tokens(neuron, route, body, "a") == 0
    for account in ("b", None):
        assert await cached_tokens(neuron, route, body, account) == 0
    for account in ("a", "b", None):
        assert await cached_tokens(neuron, route, body, account) >= 32


async def test_H10_a_client_may_keep_its_prefixes_to_itself(neuron: RunningNeuron) -> None:
    route, text = "/v1/chat/completions", "Tell me of the sea and of its tides. " * 8
    body = ask(neuron, text, max_tokens=1, cache_salt="mine")
    assert await cached_tokens(neuron, route, body) == 0
    assert await cached_tokens(neuron, route, ask(neuron, text, max_tokens=1)) == 0
    assert await cached_tokens(neuron, route, body) >= 32


async def test_a_schema_is_obeyed(neuron: RunningNeuron) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    text = await answer_of(neuron, "What is 12+30?", response_format=form, max_tokens=200)
    assert isinstance(json.loads(text)["sum"], int)


async def test_many_at_once_answer_as_if_alone_and_hold_nothing_afterwards(neuron: RunningNeuron) -> None:
    questions = [f"What is {number}+{number % 7}?" for number in range(12)]
    together = await asyncio.gather(*(answer_of(neuron, question) for question in questions))
    assert together == [await answer_of(neuron, question) for question in questions]
    leaving = [asyncio.create_task(answer_of(neuron, "Hi", ignore_eos=True, max_tokens=5000)) for _ in range(4)]
    await eventually(lambda: neuron.served.stats.running >= 4)
    for task in leaving:
        task.cancel()
    await eventually(lambda: neuron.served.stats.running == neuron.served.stats.waiting == 0)
    await eventually(lambda: neuron.served.admission.in_flight == 0)
    load = neuron.served.load()
    assert load.kv_available_mb == load.kv_budget_mb
    assert neuron.served.stats.free_pages == neuron.served.stats.total_pages


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 11}])
async def test_a_killed_engine_costs_a_stream_nothing(neuron: RunningNeuron, sampling: dict[str, Any]) -> None:
    request = json.dumps(ask(neuron, "Count from 1 to 60.", stream=True, max_tokens=600, **sampling))

    async def answer(*, kill: bool) -> str:
        async with neuron.client.post(neuron.url + CHAT, data=request) as response:
            body = b""
            while body.count(b"\n\n") < 40:
                more = await response.content.readany()
                assert more, "the answer is too short for this test"
                body += more
            if kill:
                os.kill(neuron.served.group.pids[0], signal.SIGKILL)
            body += await response.read()
        assert body.endswith(b"data: [DONE]\n\n"), body[-300:]
        chunks = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    undisturbed = await answer(kill=False)
    (pid,) = neuron.served.group.pids
    assert await answer(kill=True) == undisturbed
    assert neuron.served.group.pids != [pid]


async def test_a_checkpoint_that_lies_is_refused_with_its_reason(neuron: RunningNeuron, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((demo_model_path() / name).read_bytes())
    config = msgspec.json.decode((demo_model_path() / "config.json").read_bytes())
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({**config, "hidden_size": 64}))
    (tmp_path / "model.safetensors").write_bytes((demo_model_path() / "model.safetensors").read_bytes())
    status, _, body = await neuron.post("/models/load", {"model_id": f"file:{tmp_path}"})
    error = json.loads(body)["error"]
    assert status == 422 and error["code"] == "bad_checkpoint", error
    await neuron.post("/models/unload", {"model_id": f"file:{tmp_path}"})
