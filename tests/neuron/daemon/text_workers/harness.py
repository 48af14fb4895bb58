"""Workers that serve a checkpoint, requests to them, and what becomes of their processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.text_workers.served_text import ServedText
from neuron.daemon.text_workers.settings import TextSettings
from neuron.daemon.text_workers.worker_handle import LostReason

from tests.neuron.daemon.text_workers.checkpoints import chat, checkpoint

WINDOW = 2048
SMALL = TextSettings(max_workers=2, cpu_s=0.5, memory_bytes=256 * 2**20)
"""Budgets that a test can wait for, in processor time."""


@asynccontextmanager
async def served(folder: Path, settings: TextSettings = SMALL, **options: Any) -> AsyncIterator[ServedText]:
    ends: list[LostReason] = []
    text = await ServedText.open(str(checkpoint(folder, **options)), settings, label="m", on_end=ends.append)
    text.ends = ends  # type: ignore[attr-defined]
    try:
        yield text
    finally:
        await text.close()


def prepare(text: ServedText, content: str, principal: str | None = None, **fields: Any) -> Awaitable[Any]:
    body = chat(content, **fields)
    return text.prepare("chat_completion", body, max_model_len=WINDOW, principal=principal)


async def refusal(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value
