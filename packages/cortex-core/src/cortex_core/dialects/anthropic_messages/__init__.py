"""Anthropic messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from cortex_core.dialects.anthropic_messages.answer import (
    Collector,
    Projector,
    count_tokens_body,
    new_response_id,
)
from cortex_core.dialects.anthropic_messages.request import (
    IGNORED,
    MAPPED,
    drop_attribution,
    parse,
    parse_count_tokens,
)

__all__ = [
    "IGNORED",
    "MAPPED",
    "Collector",
    "Projector",
    "count_tokens_body",
    "drop_attribution",
    "new_response_id",
    "parse",
    "parse_count_tokens",
]
