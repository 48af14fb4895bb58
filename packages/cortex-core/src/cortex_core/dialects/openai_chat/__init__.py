"""OpenAI chat completions: `POST /v1/chat/completions`."""

from cortex_core.dialects.openai_chat.answer import Collector, Projector, new_response_id
from cortex_core.dialects.openai_chat.request import IGNORED, MAPPED, REFUSED, parse

__all__ = ["IGNORED", "MAPPED", "REFUSED", "Collector", "Projector", "new_response_id", "parse"]
