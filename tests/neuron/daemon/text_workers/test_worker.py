"""A worker within its bounds: what ends it costs no other request."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.neuron.daemon.text_workers.checkpoints import ALLOCATES, LOOPS, PLAIN
from tests.neuron.daemon.text_workers.harness import prepare, refusal, served


async def test_H8_a_template_that_loops_ends_its_worker_and_no_other_request(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN) as text:
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        for _ in range(20):
            await prepare(text, "hello")
            assert not looping.done()
        error = await looping
        assert (error.code, error.status, error.param) == ("text_budget_exceeded", 400, "messages")
        assert "0.5 s of processor time" in error.message
        assert text.ends == ["cpu"]  # type: ignore[attr-defined]
        await prepare(text, "hello")


async def test_H8_a_template_that_allocates_ends_its_worker_and_no_other_request(tmp_path: Path) -> None:
    async with served(tmp_path, template=ALLOCATES + PLAIN) as text:
        errors = await asyncio.gather(*(refusal(prepare(text, "GROW")) for _ in range(3)))
        assert {error.code for error in errors} == {"text_budget_exceeded"}
        assert "256 MiB of memory" in errors[0].message
        await prepare(text, "hello")
