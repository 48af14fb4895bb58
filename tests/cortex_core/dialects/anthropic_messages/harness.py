"""Messages requests with a field changed, parsed or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages
from cortex_core.errors import ApiError

WEATHER = {"name": "get_weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}


def parse(**fields: Any) -> Request:
    body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], **fields}
    return anthropic_messages.parse(json.dumps(body).encode())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the envelope has no param: the message names it"
    return caught.value


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]
