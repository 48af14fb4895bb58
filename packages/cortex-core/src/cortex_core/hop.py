"""Headers between a gateway and a neuron, beside a client's own request and answer.

A gateway sends `x-cortex-hop: 1`; the neuron then writes comments into an event stream that no client ever sees:

- `: cortex-stream {…}`, the first thing of a stream that can be continued elsewhere: a `StreamHead`.
- `: cortex-tokens […]`, behind the events of each write: the `Batch` of token ids that the events came from. What
  lies before a mark and after the mark before it belongs together: a gateway that passes on whole writes only always
  knows which tokens its client has seen the text of. Where the client asked for log-probabilities they come along:
  those of text that is still held back (half a character, the beginning of a stop string) are due with it.
- `: cortex-usage {…}`, just before the last event: the tokens, and in `finish` why each choice ended. The last write
  has no tokens behind it.
- `: cortex-unfinished`, before an error that is no fault of the request: another neuron may go on. Where an engine
  ended while it held the request, `{"ended_engine": …}` follows in the same line.

When a neuron dies in the middle, the gateway sends the client's request to another one with `x-cortex-resume: N`: the
first N bytes of the body are a `ResumeState`, the rest is the request as it came. That neuron renders the prompt,
takes the ids as generated, rebuilds from the batches what the client has seen, and goes on behind it. Noise is a
function of (seed, position), so the answer is the one that the first neuron would have given.

What a gateway says beside a client's request is a claim. A neuron that was given the secret of its fleet believes it
(`CLAIMS`) of those who know the secret and of nobody else; one that was given none trusts its network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from cortex_core.errors import ENDED_ENGINE

RESOLVED_MODEL_HEADER = "x-cortex-resolved-model"
HOP_HEADER = "x-cortex-hop"
RESUME_HEADER = "x-cortex-resume"
CACHE_SALT_HEADER = "x-cortex-cache-salt"
"""Requests with different ones share no cached prefix: a gateway sends one for each account."""
FINGERPRINT_HEADER = "x-cortex-fingerprint"
"""Of a stream to a gateway: what the model is served with. Where two nodes give the same and are deterministic, a
stream that moves between them is the one that the first would have given, to the bit."""
PRIORITY_HEADER = "x-cortex-priority"
"""A client's wish towards a gateway, which lowers it to what the key may; towards a neuron what it has come to."""
PRIORITIES = {"low": -1, "normal": 0, "high": 1}
SECRET_HEADER = "x-cortex-secret"  # noqa: S105  (its name)

CLAIMS = frozenset(
    (
        b"x-cortex-principal",
        b"x-helexa-account-id",
        b"x-helexa-key-id",
        HOP_HEADER.encode(),
        RESUME_HEADER.encode(),
        CACHE_SALT_HEADER.encode(),
        PRIORITY_HEADER.encode(),
    )
)
"""Who asks, and what only a gateway has a use for. Not the resolved model: a body may name any model as well."""

STREAM_MARK = b": cortex-stream "
# The line feed before it cannot stand in an event's data, so a model that writes the mark is not mistaken for it.
TOKENS_MARK = b"\n: cortex-tokens "
USAGE_MARK = b": cortex-usage "
UNFINISHED_MARK = b": cortex-unfinished"
MARK_END = b"\n\n"


class StreamHead(msgspec.Struct, frozen=True):
    """What a continued stream keeps: its id, its time (Unix seconds) and the seed of each choice."""

    id: str
    created: int
    seeds: tuple[int, ...]


class ChoiceTokens(msgspec.Struct, frozen=True, array_like=True):
    """New output ids of one choice; finish is the engine's reason, cached_tokens comes with the first batch."""

    choice: int
    token_ids: list[int]
    finish: Literal["stop", "length", "grammar"] | None = None
    cached_tokens: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one token: its natural-log probability and those of the most likely ids. None is minus infinity, which JSON
    has no number for."""

    logprob: float | None
    top_ids: list[int] = []
    top_logprobs: list[float | None] = []


class LoggedTokens(ChoiceTokens, frozen=True, array_like=True):
    """With the log-probabilities of the ids, where there are any. What is written without them reads as this too."""

    logprobs: list[TokenLogprobs] | None = None


Batch = Sequence[ChoiceTokens]


class ResumeState(msgspec.Struct, frozen=True):
    """An answer as far as it has come: its head, and the tokens that followed."""

    head: StreamHead
    batches: tuple[list[LoggedTokens], ...]


_encode = msgspec.json.Encoder().encode
_state_decoder = msgspec.json.Decoder(ResumeState)


def stream_comment(head: StreamHead) -> bytes:
    return STREAM_MARK + _encode(head) + MARK_END


def tokens_comment(batch: Batch) -> bytes:
    return TOKENS_MARK + _encode(batch) + MARK_END


def unfinished_comment(ended_engine: str | None) -> bytes:
    if ended_engine is None:
        return UNFINISHED_MARK + MARK_END
    return UNFINISHED_MARK + b" " + _encode({ENDED_ENGINE: ended_engine}) + MARK_END


def resume_state(head: bytes, batches: bytes) -> tuple[bytes, str]:
    """What stands in front of the request in the body that continues a stream, and the header's value. `batches`: their
    JSON texts, each with a comma behind."""
    state = b'{"head":%s,"batches":[%s]}' % (head, batches[:-1])
    return state, str(len(state))


def resume_body(head: bytes, batches: bytes, request: bytes) -> tuple[bytes, str]:
    """The body that continues a stream, and its header value."""
    state, length = resume_state(head, batches)
    return state + request, length


def split_resume(header: bytes, body: bytes) -> tuple[ResumeState, bytes]:
    """The state and the client's own body. Raises `ValueError`."""
    if not header.isdigit() or int(header) > len(body):
        raise ValueError(f"the header says {header[:20]!r} of {len(body)} bytes")
    length = int(header)
    try:
        return _state_decoder.decode(body[:length]), body[length:]
    except msgspec.MsgspecError as exc:
        raise ValueError(str(exc)) from exc
