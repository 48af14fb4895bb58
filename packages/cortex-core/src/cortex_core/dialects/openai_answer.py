"""Parts of answers that OpenAI chat and completions share: ids, usage, finish reasons, stream framing."""

from __future__ import annotations

import uuid
from typing import Any, Literal

import msgspec

from cortex_core.conversation import Request
from cortex_core.dialects.errors import openai_error_body
from cortex_core.errors import ApiError
from cortex_core.events import FinishReason, Usage

encode_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
EVENT_END = b"\n\n"

LEAST_LOGPROB = -9999.0
"""The official stand-in for minus infinity, which JSON cannot hold."""

OpenAiFinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

FINISH_REASONS: dict[FinishReason, OpenAiFinishReason] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def finite_logprob(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


class ChunkFrame:
    """The constant bytes around what changes from chunk to chunk, encoded once per stream.

    A chunk is `prefix + choices + suffix`, where choices is the JSON array of one choice object or none.
    """

    __slots__ = ("include_usage", "prefix", "suffix")

    def __init__(self, request: Request, *, kind: str, response_id: str, created: int, model: str) -> None:
        self.include_usage = request.include_usage
        head = {"id": response_id, "object": kind, "created": created, "model": model}
        self.prefix = b"data: " + encode_json(head)[:-1] + b',"choices":'
        self.suffix = (b',"usage":null}' if self.include_usage else b"}") + EVENT_END

    def usage_chunk(self, usage: Usage) -> bytes:
        """The chunk after the last choice's last; nothing unless the client asked for it."""
        if not self.include_usage:
            return b""
        return self.prefix + b'[],"usage":' + encode_json(usage_object(usage)) + b"}" + EVENT_END


def error_event(error: ApiError) -> bytes:
    """Mid-stream: the error object as one data event, after which the stream closes without `[DONE]`."""
    return b"data: " + openai_error_body(error, None) + EVENT_END


class StreamEnd:
    """Whether a stream may still say something, and whether it may end."""

    __slots__ = ("has_usage", "is_closed")

    def __init__(self) -> None:
        self.has_usage = False
        self.is_closed = False

    def done(self) -> bytes:
        if self.is_closed:
            return b""
        if not self.has_usage:
            raise RuntimeError("the stream cannot end before its usage is known")
        self.is_closed = True
        return DONE

    def fail(self, error: ApiError) -> bytes:
        if self.is_closed:
            return b""
        self.is_closed = True
        return error_event(error)
