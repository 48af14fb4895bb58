"""Messages requests with a field changed, parsed or refused."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages

from tests.cortex_core.dialects.harness import refused_by

WEATHER = {"name": "get_weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}


def parse(**fields: Any) -> Request:
    body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], **fields}
    return anthropic_messages.parse(json.dumps(body).encode())


refused = partial(refused_by, parse)


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]
