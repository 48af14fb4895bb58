"""Frames between the daemon, a model's text host and its workers: 4 bytes of length, then one msgpack document.

Behind the frame of a job comes the body of its request as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from cortex_core.errors import ApiError, ErrorKind

from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import ReasoningState
from neuron.protocol import FrameError, GrammarSpec, SamplingParams

PREFIX_BYTES = 4
MAX_FRAME_BYTES = 512 * 2**20

# ---------------------------------------------------------------- daemon -> host


class LoadText(msgspec.Struct, frozen=True, array_like=True):
    """The first frame. path: the checkpoint's folder. drops_attribution: see `MessagesDialect`. worker_memory_bytes:
    what a worker may take beyond what the host had. cpu_s: processor seconds of a short job, and of trying a template
    out."""

    path: str
    drops_attribution: bool
    worker_memory_bytes: int
    cpu_s: float


FORK = b"F"
"""Comes with the worker's end of a socket."""
KILL = b"K"
"""Before the pid (4 bytes): kill a worker. Only its parent can do so without ever meeting another process's pid."""
YIELD = b"N"
"""Before the pid (4 bytes): let others have the processor first."""

# ---------------------------------------------------------------- host -> daemon


class Loading(msgspec.Struct, frozen=True, tag="loading", array_like=True):
    """What is read from here on, within so many processor seconds; it is named where the host ends in it."""

    stage: Literal["tokenizer", "chat template", "generation defaults"]
    cpu_s: float


class TextInfo(msgspec.Struct, frozen=True, array_like=True):
    """What the daemon knows of a model's text. token_bytes: see `TokenTable`."""

    token_bytes: list[bytes]
    special_ids: list[int]
    strips_leading_space: bool
    reasoning: MarkerPair | None
    tool_calls: MarkerPair
    renders_tools: bool
    can_reason: bool
    uses_xml_calls: bool
    tokenizer_json: str


class TextLoaded(msgspec.Struct, frozen=True, tag="loaded", array_like=True):
    """The checkpoint's text files are read, and the worker takes jobs."""

    info: TextInfo


class TextRefused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """The checkpoint's text files cannot be used."""

    reason: str


Stage = Literal["start", "body", "messages", "prompt", "grammar"]
STAGES: tuple[Stage, ...] = ("start", "body", "messages", "prompt", "grammar")
"""Where in a job a worker was, `start` before it has one; its number is the byte that it shares with its host."""


class WorkerEnded(msgspec.Struct, frozen=True, tag="ended", array_like=True):
    """code: the exit code, or minus the signal. stage: what it was at."""

    pid: int
    code: int
    stage: Stage


FromHost = Loading | TextLoaded | TextRefused | WorkerEnded

# ---------------------------------------------------------------- daemon -> worker

DialectRoute = Literal["chat_completion", "responses", "messages", "completion"]


class Prepare(msgspec.Struct, frozen=True, tag="prepare", array_like=True):
    """Parse, render, tokenise, resolve. max_model_len: positions of the engine."""

    dialect: DialectRoute
    max_model_len: int


class Count(msgspec.Struct, frozen=True, tag="count", array_like=True):
    """Prompt tokens of a request. max_model_len: 0 where no engine has said so yet."""

    dialect: Literal["messages", "responses"]
    max_model_len: int


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize", array_like=True):
    """Work: parse the body of a tokenize request, and tokenise its text."""

    max_model_len: int


class Detokenize(msgspec.Struct, frozen=True, tag="detokenize", array_like=True):
    """Work: parse the body of a detokenize request, and turn its ids into text."""


Work = Prepare | Count | Tokenize | Detokenize


class Job(msgspec.Struct, frozen=True, array_like=True):
    """cpu_s: processor seconds after which the kernel ends the worker. num_bytes: of the body that follows."""

    cpu_s: float
    work: Work
    num_bytes: int


# ---------------------------------------------------------------- worker -> daemon


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """First message of a process: here it is."""

    pid: int


class PreparedPrompt(msgspec.Struct, frozen=True, array_like=True):
    """See `Prompt` and `Choice`; text only where the request asks for its echo."""

    token_ids: list[int]
    text: str
    is_chat: bool
    reasoning: ReasoningState
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    grammar: GrammarSpec | None


class Prepared(msgspec.Struct, frozen=True, tag="prepared", array_like=True):
    """request: the parsed request as JSON, without its messages and prompts, which nobody reads any more. sampling: of
    every choice but for its seed."""

    request: bytes
    prompts: list[PreparedPrompt]
    sampling: SamplingParams
    seeds: list[int]
    prompt_logprobs: bool


class Counted(msgspec.Struct, frozen=True, tag="counted", array_like=True):
    """Result of `Count`."""

    num_tokens: int


class Answer(msgspec.Struct, frozen=True, tag="answer", array_like=True):
    """The JSON body of an answer."""

    body: bytes


class Refused(msgspec.Struct, frozen=True, tag="error", array_like=True):
    """An `ApiError`. is_out_of_memory: the job needed more than its budget, and the worker ends."""

    kind: ErrorKind
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    extras: dict[str, Any] = {}
    status: int | None = None
    is_out_of_memory: bool = False

    @classmethod
    def of(cls, error: ApiError) -> Refused:
        return cls(error.kind, error.message, error.code, error.param, error.retry_after, error.extras, error.status)

    def error(self) -> ApiError:
        return ApiError(
            self.kind,
            self.message,
            code=self.code,
            param=self.param,
            retry_after=self.retry_after,
            extras=self.extras,
            status=self.status,
        )


Result = Prepared | Counted | Answer | Refused


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    """What became of a job. stage: where it was when it ended. is_last: the worker takes no other."""

    result: Result
    stage: Stage
    is_last: bool


FromWorker = Hello | Done

# ---------------------------------------------------------------- frames

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytearray:
    """One frame. Raises `FrameError` above `MAX_FRAME_BYTES`."""
    frame = bytearray(PREFIX_BYTES)
    _encoder.encode_into(message, frame, PREFIX_BYTES)
    length = len(frame) - PREFIX_BYTES
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is larger than {MAX_FRAME_BYTES}")
    frame[:PREFIX_BYTES] = length.to_bytes(PREFIX_BYTES, "little")
    return frame


class FrameReader:
    """Frames out of the pieces in which they come; each byte is copied once."""

    __slots__ = ("_buffer", "_wanted")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = PREFIX_BYTES

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that are complete now. Raises `FrameError`."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        while len(buffer) >= self._wanted:
            length = int.from_bytes(buffer[:PREFIX_BYTES], "little")
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes is larger than {MAX_FRAME_BYTES}")
            end = PREFIX_BYTES + length
            if len(buffer) < end:
                self._wanted = end
                break
            payloads.append(bytes(memoryview(buffer)[PREFIX_BYTES:end]))
            del buffer[:end]
            self._wanted = PREFIX_BYTES
        return payloads


_from_host = msgspec.msgpack.Decoder(FromHost)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def decode_from_host(payload: bytes) -> FromHost:
    """Raises `FrameError`."""
    message: FromHost = _decoded(_from_host, payload)
    return message


def decode_from_worker(payload: bytes) -> FromWorker:
    """Raises `FrameError`."""
    message: FromWorker = _decoded(_from_worker, payload)
    return message


def _decoded(decoder: msgspec.msgpack.Decoder[Any], payload: bytes) -> Any:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise FrameError(str(exc)) from exc
