"""Jobs for processes that read bodies, and those processes."""

from __future__ import annotations

import json
from pathlib import Path

from cortex_gateway.bodies.messages import Facts, Read, Translate
from cortex_gateway.bodies.pool import BodyWorkers

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}).encode()


async def read(workers: BodyWorkers, body: bytes = BODY, principal: str | None = "a") -> Facts:
    facts, pieces = await workers.run(Read(len(body)), [body], num_bytes=len(body), principal=principal)
    assert isinstance(facts, Facts) and pieces == []
    return facts


def translation(body: bytes) -> Translate:
    return Translate(len(body), "messages", "m", "theirs", extensions=True, drops_attribution=True)


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
