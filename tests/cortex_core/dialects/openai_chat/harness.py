"""Chat requests with a field changed, parsed or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import openai_chat
from cortex_core.errors import ApiError


def parse(**fields: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return openai_chat.parse(json.dumps(body).encode())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the message names the field"
    return caught.value
