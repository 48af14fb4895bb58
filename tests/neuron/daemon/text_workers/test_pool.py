"""Workers that are killed, from outside and by what they are given: only their own request notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.text_workers import pool as pool_module
from neuron.daemon.text_workers.host_process import TextLoadError
from neuron.daemon.text_workers.limits import cpu_budget_s
from neuron.daemon.text_workers.messages import Count, Detokenize, Tokenize
from neuron.daemon.text_workers.served_text import ServedText
from neuron.daemon.text_workers.settings import TextSettings

from tests.neuron.daemon.text_workers.checkpoints import (
    ALLOCATES,
    ALLOCATES_WHEN_COMPILED,
    ALWAYS_LOOPS,
    LOOPS,
    PLAIN,
    SMALL,
    chat,
    checkpoint,
    served,
)
from tests.neuron.scripted_engine import eventually

WINDOW = 2048


def prepare(text: ServedText, content: str, principal: str | None = None, **fields: Any) -> Awaitable[Any]:
    body = chat(content, **fields)
    return text.prepare("chat_completion", body, max_model_len=WINDOW, principal=principal)


async def refusal(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_requests_are_prepared_counted_and_tokenised(tmp_path: Path) -> None:
    async with served(tmp_path) as text:
        request, (choice,) = await prepare(text, "hello world", max_tokens=3, stop=["x"])
        assert request.limits.stop == ("x",) and choice.max_tokens == 3 and choice.prompt.token_ids
        body = chat("hello world", max_tokens=3)
        assert await text.count(Count("messages", WINDOW), body, principal=None) == choice.prompt.num_tokens
        body = json.dumps({"model": "m", "prompt": "hello"}).encode()
        tokens = json.loads(await text.answer(Tokenize(WINDOW), body, principal=None))
        body = json.dumps({"model": "m", "tokens": tokens["tokens"]}).encode()
        assert json.loads(await text.answer(Detokenize(), body, principal=None)) == {"prompt": "hello"}
        assert tokens["max_model_len"] == WINDOW and tokens["count"] == len(tokens["tokens"])


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


@pytest.mark.parametrize(
    ("template", "why"),
    [(ALWAYS_LOOPS, "took more than 0.5 s of processor time"), (ALLOCATES_WHEN_COMPILED, "MiB of memory")],
    ids=["loops", "allocates"],
)
async def test_H8_a_template_that_is_always_hostile_is_refused_at_load(tmp_path: Path, template: str, why: str) -> None:
    with pytest.raises(TextLoadError, match="the chat template cannot be used") as caught:
        await ServedText.open(str(checkpoint(tmp_path, template=template + PLAIN)), SMALL, label="m")
    assert why in str(caught.value)


async def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(TextLoadError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        await ServedText.open(str(tmp_path), SMALL, label="m")


async def test_a_worker_killed_from_outside_costs_no_request(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        await eventually(lambda: len(text.pool.pids) == 2)
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        await eventually(lambda: any(_is_busy(pid) for pid in text.pool.pids[1:]))
        await prepare(text, "hello")
        for pid in text.pool.pids[1:]:  # one of them is at the loop, which may be tried once more
            os.kill(pid, signal.SIGKILL)
        await eventually(lambda: text.ends == ["died"])  # type: ignore[attr-defined]
        await prepare(text, "hello")
        assert not looping.done()
        looping.cancel()


async def test_a_request_that_ends_every_worker_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        for ends in (1, 2):
            await eventually(lambda: any(_is_busy(pid) for pid in text.pool.pids[1:]))
            for pid in text.pool.pids[1:]:
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda ends=ends: text.ends.count("died") == ends)  # type: ignore[attr-defined,misc]
        assert (await looping).code == "text_worker_died"


def _is_busy(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[11]) >= 5  # hundredths of a second in user mode


async def test_the_host_is_started_anew_and_nobody_is_lost(tmp_path: Path) -> None:
    async with served(tmp_path) as text:
        await prepare(text, "hello")
        host, *workers = text.pool.pids
        os.kill(host, signal.SIGKILL)
        await eventually(lambda: text.pool.unavailable is not None)
        await prepare(text, "hello")
        assert text.pool.unavailable is None and text.pool.pids[0] != host
        assert not any(is_alive(pid) for pid in (host, *workers))


async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = num_descriptors()
    async with served(tmp_path, template=LOOPS + PLAIN) as text:
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        await prepare(text, "hello")
        pids = text.pool.pids
    assert (await looping).code == "model_unloading"
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    await eventually(lambda: num_descriptors() <= before)


async def test_a_client_that_leaves_takes_its_work_along(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        looping = asyncio.ensure_future(prepare(text, "LOOP"))
        await prepare(text, "hello")
        looping.cancel()
        await eventually(lambda: text.ends == ["abandoned"])  # type: ignore[attr-defined]
        await prepare(text, "hello")


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
