"""Anthropic messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from cortex_core.conversation import Request
from cortex_core.dialects.anthropic_messages.answer import (
    Collector,
    Projector,
    count_tokens_body,
    new_response_id,
)
from cortex_core.dialects.anthropic_messages.request import (
    ATTRIBUTION_FILTER,
    IGNORED,
    MAPPED,
    drop_attribution,
    parse,
    parse_count_tokens,
)


class MessagesDialect:
    """The dialect as a server is configured: `interface.Dialect`, with the attribution filter on or off."""

    Projector = Projector
    Collector = Collector

    def __init__(self, *, drops_attribution: bool = True) -> None:
        self._drops_attribution = drops_attribution

    def parse(self, body: bytes) -> Request:
        return parse(body, drops_attribution=self._drops_attribution)

    def parse_count_tokens(self, body: bytes) -> Request:
        return parse_count_tokens(body, drops_attribution=self._drops_attribution)

    def new_response_id(self) -> str:
        return new_response_id()


__all__ = [
    "ATTRIBUTION_FILTER",
    "IGNORED",
    "MAPPED",
    "Collector",
    "MessagesDialect",
    "Projector",
    "count_tokens_body",
    "drop_attribution",
    "new_response_id",
    "parse",
    "parse_count_tokens",
]
