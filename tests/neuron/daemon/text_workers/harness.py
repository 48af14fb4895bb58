"""Requests to text workers, and what becomes of their processes."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.text_workers.served_text import ServedText

from tests.neuron.daemon.text_workers.checkpoints import chat

WINDOW = 2048


def prepare(text: ServedText, content: str, principal: str | None = None, **fields: Any) -> Awaitable[Any]:
    body = chat(content, **fields)
    return text.prepare("chat_completion", body, max_model_len=WINDOW, principal=principal)


async def refusal(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value
