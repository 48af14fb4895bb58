"""Chat requests with a field changed, parsed or refused."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from cortex_core.conversation import Request
from cortex_core.dialects import openai_chat

from tests.cortex_core.dialects.harness import refused_by


def parse(**fields: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return openai_chat.parse(json.dumps(body).encode())


refused = partial(refused_by, parse)
