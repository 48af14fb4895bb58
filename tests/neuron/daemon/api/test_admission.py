"""Fair shares over HTTP: whole daemons, real sockets, an engine that is scripted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from neuron.daemon.common.config import AdmissionConfig, ContextLimitConfig, EngineTables, HarnessConfig, NeuronConfig

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron
from tests.neuron.scripted_engine import eventually
from tests.neuron.scripted_worker import HOLD, TOTAL_PAGES

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
KEY_A, KEY_B = {"authorization": "Bearer key-a"}, {"x-api-key": "key-b"}


@asynccontextmanager
async def neuron_with(
    folder: Path, *, output_reserve_tokens: int = 8192, **limits: Any
) -> AsyncIterator[RunningNeuron]:
    candle = EngineTables(
        admission=AdmissionConfig(**limits),
        context_limit=ContextLimitConfig(output_reserve_tokens=output_reserve_tokens),
    )
    async with run_neuron(folder, config=NeuronConfig(harness=HarnessConfig(candle=candle))) as neuron:
        yield neuron


def hold(neuron: RunningNeuron, headers: dict[str, str] | None = None, path: str = CHAT, **settings: Any) -> Any:
    """A request that stays in the engine until its client leaves."""
    request = neuron.chat(**{"top_k": HOLD, "max_tokens": 50, **settings})
    return asyncio.create_task(neuron.post(path, request, headers))


async def load_of(neuron: RunningNeuron) -> dict[str, Any]:
    (load,) = (await neuron.get("/health"))["models"]
    return dict(load)


async def nothing_is_left(neuron: RunningNeuron) -> None:
    desk = neuron.served.admission
    await eventually(lambda: not (desk.in_flight or desk.queue_depth or desk.reserved_pages or desk.num_principals))


async def test_a_key_is_a_principal_and_gets_the_next_seat(checkpoint: Path) -> None:
    async with neuron_with(checkpoint, max_in_flight=2) as neuron:
        desk = neuron.served.admission
        mine = [hold(neuron, KEY_A) for _ in range(2)]
        await eventually(lambda: desk.in_flight == 2)
        waiting = hold(neuron, KEY_A)
        await eventually(lambda: desk.queue_depth == 1)
        other = asyncio.create_task(neuron.post(CHAT, neuron.chat(), KEY_B))
        await eventually(lambda: desk.queue_depth == 2)
        mine[0].cancel()
        status, _, _ = await other  # although it came last
        assert status == 200
        await eventually(lambda: desk.in_flight == 2)
        for task in (mine[1], waiting):
            task.cancel()
        await nothing_is_left(neuron)


async def test_F21_requests_without_a_key_leave_a_seat_to_others(checkpoint: Path) -> None:
    async with neuron_with(checkpoint, max_in_flight=3, max_queue_depth=0) as neuron:
        anonymous = [hold(neuron) for _ in range(2)]
        await eventually(lambda: neuron.served.admission.anon_in_flight == 2)
        status, headers, body = await neuron.post(CHAT, neuron.chat())
        assert status == 429 and headers["retry-after"] and b"rate_limit_exceeded" in body
        status, _, _ = await neuron.post(CHAT, neuron.chat(), KEY_A)
        assert status == 200
        load = await load_of(neuron)
        assert (load["anon_in_flight"], load["anon_max_in_flight"], load["rejected_anon_yield"]) == (2, 2, 1)
        async with neuron.client.get(neuron.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        label = f'{{model="{neuron.model}"}}'
        assert f"neuron_anon_in_flight{label} 2.0" in lines and f"neuron_principals{label} 1.0" in lines
        assert f'neuron_rejections_total{{model="{neuron.model}",reason="anon_yield"}} 1.0' in lines
        for task in anonymous:
            task.cancel()
        await nothing_is_left(neuron)


async def test_no_anonymous_seats_is_a_401_in_both_dialects(checkpoint: Path) -> None:
    async with neuron_with(checkpoint, anon_max_in_flight=0) as neuron:
        for path in (CHAT, MESSAGES):
            status, _, body = await neuron.post(path, neuron.chat())
            assert status == 401 and "API key" in json.loads(body)["error"]["message"]
            assert (await neuron.post(path, neuron.chat(), KEY_B))[0] == 200


async def test_a_ceiling_per_principal_is_a_429(checkpoint: Path) -> None:
    async with neuron_with(checkpoint, max_per_principal=1) as neuron:
        mine = hold(neuron, {"x-cortex-principal": "alice"})
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        status, _, _ = await neuron.post(CHAT, neuron.chat(), {"x-helexa-account-id": "alice"})
        assert status == 429 and (await load_of(neuron))["rejected_per_principal"] == 1
        assert (await neuron.post(CHAT, neuron.chat(), {"x-cortex-principal": "bob"}))[0] == 200
        mine.cancel()
        await nothing_is_left(neuron)


@pytest.mark.parametrize("stream", [False, True])
async def test_F17_a_request_waits_for_pages_and_then_is_answered(checkpoint: Path, stream: bool) -> None:
    async with neuron_with(checkpoint, output_reserve_tokens=8192) as neuron:
        desk = neuron.served.admission
        # Requests of several choices reserve the cache without long prompts.
        neuron.served.outputs.observe(10**6)
        big = hold(neuron, n=8, max_tokens=4000)
        await eventually(lambda: desk.in_flight == 1)
        assert desk.reserved_pages > TOTAL_PAGES * 0.45
        more = [hold(neuron, n=8, max_tokens=4000)]
        await eventually(lambda: desk.in_flight == 2)
        waiting = asyncio.create_task(neuron.post(CHAT, neuron.chat(stream=stream, n=8, max_tokens=2000), KEY_A))
        await eventually(lambda: desk.queue_depth == 1)
        load = await load_of(neuron)
        assert (
            load["kv_budget_mb"] == TOTAL_PAGES and load["kv_available_mb"] == desk.available_pages < TOTAL_PAGES // 10
        )
        big.cancel()
        status, _, body = await waiting
        assert status == 200, body
        more[0].cancel()
        await nothing_is_left(neuron)


async def test_waiting_too_long_for_pages_says_how_many(checkpoint: Path) -> None:
    async with neuron_with(checkpoint, max_wait_secs=0.0, kv_max_wait_secs=0.05) as neuron:
        neuron.served.outputs.observe(10**6)
        big = hold(neuron, n=8, max_tokens=4000)
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        status, headers, body = await neuron.post(CHAT, neuron.chat(max_tokens=4000, n=16))
        error = json.loads(body)["error"]
        assert status == 503 and error["code"] == "kv_cache_timeout" and headers["retry-after"]
        assert error["required_mb"] > error["free_mb"] > 0
        assert (await load_of(neuron))["rejected_kv_timeout"] == 1
        big.cancel()
        await nothing_is_left(neuron)


async def test_F25_the_probe_and_the_request_path_agree(checkpoint: Path) -> None:
    async with neuron_with(checkpoint) as neuron:
        desk = neuron.served.admission
        fine = desk.capacity
        assert fine is not None
        for num_pages in (fine.num_pages, 1, 0):
            desk.set_capacity(msgspec.structs.replace(fine, num_pages=num_pages))
            (model,) = await neuron.get("/models")
            status, _, body = await neuron.post(
                "/v1/completions", {"model": neuron.model, "prompt": [1], "max_tokens": 1}
            )
            assert model["servable"]["ok"] == (num_pages > 0) == (status == 200), body
            if status != 200:
                error = json.loads(body)["error"]
                assert status == 413 and error["code"] == model["servable"]["reason"] == "prompt_too_long_for_vram"
                assert error["budget_mb"] == 0 and model["servable"]["detail"] == error["message"]
        desk.set_capacity(fine)
        assert (await load_of(neuron))["rejected_kv_unservable"] == 1


async def test_F26_a_full_cache_is_servable(checkpoint: Path) -> None:
    async with neuron_with(checkpoint) as neuron:
        neuron.served.outputs.observe(10**6)
        filling = hold(neuron, n=32, max_tokens=4000)
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        assert neuron.served.admission.available_pages == 0
        (model,) = await neuron.get("/models")
        assert model["servable"] == {"ok": True}
        filling.cancel()
        await nothing_is_left(neuron)


async def test_keys_are_never_written_down(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with neuron_with(checkpoint) as neuron:
        with caplog.at_level(logging.INFO, logger="neuron.request"):
            await neuron.post(CHAT, neuron.chat(), KEY_A)
            await neuron.post(CHAT, neuron.chat())
        lines = [record.getMessage() for record in caplog.records if record.name == "neuron.request"]
        digest = hashlib.sha256(b"key-a").hexdigest()[:16]
        assert f"principal=key:{digest}" in lines[0] and "principal=-" in lines[1]
        assert not any("key-a" in line for line in lines)
