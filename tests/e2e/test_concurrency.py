"""A hundred requests at once: every greedy answer equals the answer given alone, and nothing is held afterwards."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai

from tests.e2e.fleet_process import MODEL, FleetProcess, eventually


def held(fleet: FleetProcess) -> dict[str, Any]:
    (load,) = [load for load in fleet.get("/health", base=fleet.neuron_url)["models"] if load["id"] == MODEL]
    return dict(load)


async def test_a_hundred_concurrent_requests_do_not_disturb_each_other(fleet: FleetProcess) -> None:
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=300)
    rng = random.Random(7)
    preamble = "You are a careful assistant. " * 12
    jobs: list[list[dict[str, str]]] = []
    for number in range(100):
        turns = [{"role": "system", "content": preamble}] if number % 3 == 0 else []
        question = rng.choice(
            [
                f"What is {rng.randrange(100)}+{rng.randrange(100)}?",
                f"Count from 1 to {rng.randrange(5, 40)}.",
                "Hello!",
                "x" * rng.randrange(1, 400),
            ]
        )
        jobs.append([*turns, {"role": "user", "content": question}])
    cancelled = set(rng.sample(range(100), 15))

    async def run(number: int) -> str | None:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=jobs[number],  # type: ignore[arg-type]
            temperature=0,
            max_completion_tokens=150,
            stream=True,
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if number in cancelled and len(text) > 3:
                await stream.close()
                return None
        return text

    together = await asyncio.gather(*(run(number) for number in range(100)))
    checked = [number for number in range(100) if together[number] is not None]
    assert len(checked) >= 85
    for number in checked:
        alone = await client.chat.completions.create(
            model=MODEL,
            messages=jobs[number],  # type: ignore[arg-type]
            temperature=0,
            max_completion_tokens=150,
        )
        assert alone.choices[0].message.content == together[number], jobs[number]
    await client.close()
    state = eventually(
        lambda: (load := held(fleet))["in_flight"] == 0 and load["queue_depth"] == 0 and load,
        within_s=5,
        what="no request in flight",
    )
    assert state["kv_available_mb"] == state["kv_budget_mb"]
