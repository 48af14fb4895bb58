"""Workers that are killed, from outside and by what they are given: only their own request notices."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.text_workers import pool as pool_module
from neuron.daemon.text_workers.limits import cpu_budget_s
from neuron.daemon.text_workers.messages import Count, Tokenize
from neuron.daemon.text_workers.settings import TextSettings

from tests.neuron.daemon.text_workers.checkpoints import LOOPS, PLAIN, chat
from tests.neuron.daemon.text_workers.harness import WINDOW, prepare, refusal, served


async def test_H9_long_work_of_one_principal_leaves_room_for_another(tmp_path: Path) -> None:
    settings = TextSettings(max_workers=2, cpu_s=30)
    async with served(tmp_path, template=LOOPS + PLAIN, settings=settings) as text:
        flood = [asyncio.ensure_future(prepare(text, "LOOP" + "x" * 9_000, "flood")) for _ in range(20)]
        await asyncio.sleep(0)  # they are queued now
        await prepare(text, "hello", "me")
        assert not any(task.done() for task in flood)
        for task in flood:
            task.cancel()


async def test_H9_what_waits_is_bounded_in_jobs_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TextSettings(max_workers=2, cpu_s=30)
    async with served(tmp_path, template=LOOPS + PLAIN, settings=settings) as text:
        monkeypatch.setattr(pool_module, "MAX_WAITING_BYTES", 50_000)
        flood = [asyncio.ensure_future(prepare(text, "LOOP" + "x" * 9_000)) for _ in range(8)]
        refused = [task for task in flood if await _is_refused(task)]
        assert {task.exception().code for task in refused} == {"text_queue_full"}  # type: ignore[union-attr]
        assert 1 <= len(refused) <= 3
        for task in flood:
            task.cancel()


async def _is_refused(task: asyncio.Future[Any]) -> bool:
    await asyncio.sleep(0)
    return task.done()


async def test_H9_a_text_of_several_windows_is_not_even_counted(tmp_path: Path) -> None:
    async with served(tmp_path) as text:
        words = "hello " * 3_000
        assert await text.count(Count("messages", WINDOW), chat(words, max_tokens=1), principal=None) > WINDOW
        for work in (
            text.count(Count("messages", WINDOW), chat(words * 100, max_tokens=1), principal=None),
            text.answer(Tokenize(WINDOW), chat(words * 100), principal=None),
            text.answer(
                Tokenize(WINDOW),
                json.dumps({"prompt": words * 100, "add_special_tokens": False}).encode(),
                principal=None,
            ),
        ):
            error = await refusal(work)
            assert error.code == "context_length_exceeded" and error.extras["max"] == WINDOW


def test_the_budget_follows_the_size_of_the_body() -> None:
    assert cpu_budget_s(5.0, 0) == 5.0
    assert cpu_budget_s(5.0, 2_000_000) == 9.0
