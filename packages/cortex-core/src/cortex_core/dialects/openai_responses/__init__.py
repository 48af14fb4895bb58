"""OpenAI responses: `POST /v1/responses` and `POST /v1/responses/input_tokens`, stateless."""

from cortex_core.dialects.openai_responses.answer import (
    Collector,
    Projector,
    error_event,
    input_tokens_body,
    new_response_id,
)
from cortex_core.dialects.openai_responses.request import (
    ECHOED,
    IGNORED,
    MAPPED,
    REFUSED,
    parse,
    parse_input_tokens,
)

__all__ = [
    "ECHOED",
    "IGNORED",
    "MAPPED",
    "REFUSED",
    "Collector",
    "Projector",
    "error_event",
    "input_tokens_body",
    "new_response_id",
    "parse",
    "parse_input_tokens",
]
