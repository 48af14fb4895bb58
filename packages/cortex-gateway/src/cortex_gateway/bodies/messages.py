"""Messages between a gateway and the process that reads its large bodies.

A message is four bytes of length (little endian) and so many bytes of MessagePack. Where it speaks of a body, its
`num_bytes` follow as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from cortex_core.conversation import Request
from cortex_core.errors import ApiError, ErrorKind

from cortex_gateway.identity.estimate import Asked

PREFIX_BYTES = 4
EXIT_OUT_OF_MEMORY = 66


class Read(msgspec.Struct, frozen=True, tag=True):
    """What does the body say of itself? shown_bytes: how much of it is wanted to be shown, without its images."""

    num_bytes: int
    shown_bytes: int = 0


class Rename(msgspec.Struct, frozen=True, tag=True):
    """The body with another model in it."""

    num_bytes: int
    name: str


class Translate(msgspec.Struct, frozen=True, tag=True):
    """The body as a server that speaks only OpenAI chat takes it; surface: where it was sent to, by name.

    asked, model: the model as the client and as the server calls it.
    """

    num_bytes: int
    surface: str
    asked: str
    model: str
    extensions: bool
    drops_attribution: bool


Job = Read | Rename | Translate


class Shown(msgspec.Struct, frozen=True):
    """The beginning of a body, without images and secrets. is_cut: there is more; is_shortened: there were images."""

    data: bytes
    is_cut: bool
    is_shortened: bool


class Facts(msgspec.Struct, frozen=True, tag=True):
    """All that a gateway needs to know of a body that passes.

    session: the key of its conversation, if it names one; prompt: as much of the prompt's beginning as is ever
    compared; model_at: where the model's name stands, None where it stands there twice.
    """

    model: str
    stream: bool | None
    asked: Asked | None
    session: str | None
    prompt: bytes
    model_at: tuple[int, int] | None
    shown: Shown | None = None
    num_bytes: int = 0


class Renamed(msgspec.Struct, frozen=True, tag=True):
    """A body of so many bytes follows, with the new name in it."""

    num_bytes: int


class Translated(msgspec.Struct, frozen=True, tag=True):
    """request: what its answer has to be put into words with; nothing of the prompt."""

    num_bytes: int
    request: Request


class Refused(msgspec.Struct, frozen=True, tag=True):
    """An `ApiError` on its way to the gateway. is_out_of_memory: it took more than it may."""

    kind: ErrorKind
    message: str
    code: str | None = None
    param: str | None = None
    status: int | None = None
    retry_after: int | None = None
    extras: dict[str, Any] = {}
    is_out_of_memory: bool = False
    num_bytes: int = 0

    @classmethod
    def of(cls, error: ApiError) -> Refused:
        return cls(
            kind=error.kind,
            message=error.message,
            code=error.code,
            param=error.param,
            status=error.status,
            retry_after=error.retry_after,
            extras=error.extras,
        )

    def error(self) -> ApiError:
        return ApiError(
            self.kind,
            self.message,
            code=self.code,
            param=self.param,
            status=self.status,
            retry_after=self.retry_after,
            extras=self.extras,
        )


Result = Facts | Renamed | Translated | Refused


class Order(msgspec.Struct, frozen=True):
    """cpu_s: the most processor time that the job may take."""

    cpu_s: float
    job: Job


class Done(msgspec.Struct, frozen=True):
    """is_last: the process ends behind it."""

    result: Result
    is_last: bool = False


_encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_done = msgspec.msgpack.Decoder(Done).decode


def encode_message(message: Order | Done) -> bytes:
    payload = _encode(message)
    return len(payload).to_bytes(PREFIX_BYTES, "little") + payload
