"""Engine groups of scripted engines."""

from __future__ import annotations

import os

from neuron.daemon.supervisor.engine_group import EngineGroup

from tests.neuron.scripted_engine import request


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def tokens_of(group: EngineGroup, *prompt_ids: int, max_tokens: int = 4) -> list[int]:
    tokens: list[int] = []
    async with await group.generate([request(*prompt_ids, max_tokens=max_tokens)]) as generation:
        async for batch in generation:
            for _, update in batch:
                tokens += update.token_ids
    return tokens
