"""A neuron as a real process with a small KV cache: who is served when, and what a full cache costs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

MODEL = "cortex/demo"

CONFIG = """
host = "127.0.0.1"
port = 0
state_dir = ""
[engine]
num_threads = 1
kv_cache_tokens = {cache}
[harness.candle.prefix_cache]
enabled = false
[harness.candle.context_limit]
output_reserve_tokens = {reserve}
"""


class NeuronProcess:
    """`neuron serve` and a client of it."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self.url = url
        self.client = client

    async def post(self, path: str, body: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with self.client.post(self.url + path, json=body, headers=headers) as response:
            return response.status, json.loads(await response.read())

    async def complete(self, prompt: str, max_tokens: int, key: str | None = None) -> str:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        status, answer = await self.post("/v1/completions", body, key)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == max_tokens
        return str(answer["choices"][0]["text"])

    async def load(self) -> dict[str, Any]:
        async with self.client.get(self.url + "/health") as response:
            (load,) = json.loads(await response.read())["models"]
            return dict(load)

    async def metric(self, name: str) -> float:
        async with self.client.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(name + "{"))
        return float(value)


@asynccontextmanager
async def neuron(folder: Path, *, cache: int = 2048, reserve: int = 8192) -> AsyncIterator[NeuronProcess]:
    config = folder / "neuron.toml"
    config.write_text(CONFIG.format(cache=cache, reserve=reserve))
    with (folder / "neuron.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "neuron", "serve", "--config", str(config)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 150)).decode()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(170)) as client:
        running = NeuronProcess(line.rpartition(" ")[2].strip(), client)
        try:
            status, answer = await running.post("/models/load", {"model_id": MODEL})
            assert status == 200, answer
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 60) == 0


def prompts(count: int, num_words: int) -> list[str]:
    rng = random.Random(11)
    return [" ".join(str(rng.randrange(1000)) for _ in range(num_words)) for _ in range(count)]


async def nothing_is_held(running: NeuronProcess) -> None:
    async with asyncio.timeout(60):
        while True:
            load = await running.load()
            if not (load["in_flight"] or load["queue_depth"]) and load["kv_available_mb"] == load["kv_budget_mb"]:
                return
            await asyncio.sleep(0.05)


async def test_a_modest_client_is_served_while_a_greedy_one_fills_cache_and_queue(tmp_path: Path) -> None:
    async with neuron(tmp_path) as running:
        texts = prompts(17, 100)
        finished: list[str] = []

        async def ask(text: str, key: str) -> None:
            await running.complete(text, 40, key)
            finished.append(key)

        greedy = [asyncio.create_task(ask(text, "greedy")) for text in texts[:16]]
        async with asyncio.timeout(60):
            while (load := await running.load())["in_flight"] + load["queue_depth"] + len(finished) < 16 or (
                load["in_flight"] < 3  # the first ones are still being prepared
            ):
                await asyncio.sleep(0.01)
        assert load["queue_depth"] > 0, "the cache is not small enough for this test"
        assert load["in_flight"] < load["max_in_flight"], "pages are short, seats are not"
        before = len(finished)
        await ask(texts[16], "modest")
        # At most those who were at work, and one more turn for each page of luck: far from all of them.
        assert len(finished) - 1 - before <= 2 * load["in_flight"] and len(finished) < 14
        await asyncio.gather(*greedy)
        assert await running.metric("neuron_engine_preemptions_total") == 0  # what was reserved was enough
        await nothing_is_held(running)


async def test_answers_longer_than_expected_cost_time_and_nothing_else(tmp_path: Path) -> None:
    """Outputs are not reserved at all: the cache is promised several times over, and every answer is right."""
    async with neuron(tmp_path, reserve=1) as running:
        texts = prompts(8, 40)
        together = await asyncio.gather(*(running.complete(text, 300) for text in texts))
        assert await running.metric("neuron_engine_preemptions_total") > 0
        alone = [await running.complete(text, 300) for text in texts[:2]]
        assert list(together[:2]) == alone
        await nothing_is_held(running)


async def test_F5_a_prompt_that_can_never_fit_is_refused_at_once_with_the_numbers(tmp_path: Path) -> None:
    async with neuron(tmp_path) as running:
        async with running.client.get(running.url + "/v1/models") as response:
            (model,) = json.loads(await response.read())["data"]
        assert model["max_model_len"] == 2048  # the checkpoint has 65536 positions, the cache this many
        busy = [asyncio.create_task(running.complete(text, 20)) for text in prompts(6, 100)]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 3000}], "max_tokens": 1}
        status, answer = await running.post("/v1/chat/completions", body)
        error = answer["error"]
        assert status == 400 and error["code"] == "context_length_exceeded"
        assert error["prompt_len"] > error["max"] == 2048
        await asyncio.gather(*busy)
        await nothing_is_held(running)
