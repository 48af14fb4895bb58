"""Messages of rank 0 to the other ranks: one for each step, over Unix sockets and not over a collective.

A follower waits in a read, so an idle group uses no CPU and no timeout runs. Frames are those of `neuron.protocol`: a
4-byte little-endian length and one msgpack document. Every message carries (epoch, step), and steps are counted
without gaps: one that is stale, or that follows a lost one, ends the group and is never computed.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from neuron.engine.errors import DeviceError

Ending = Literal["tokens", "logits"]


class GraphKey(NamedTuple):
    """Everything a launch of a decode step depends on that the host decides, apart from what never changes after
    loading (shapes and dtypes of the model, of the cache and its page tables, back ends, ranks).

    num_rows: sequences, each with one token, the last of them perhaps padding: it gives every shape and grid.
    max_context_len: sizes attention's scratch memory and lists. ends_with: whether sampling is in the graph (`tokens`),
    or follows it because penalties, masks or log-probabilities are wanted (`logits`).
    """

    num_rows: int
    max_context_len: int
    ends_with: Ending


class PackedBatch(msgspec.Struct, frozen=True, array_like=True):
    """A batch as it lies in its builder's host buffers, for a rank that has an equal builder.

    table_width: columns of the page tables. int64, int32: the filled part of each buffer.
    """

    num_tokens: int
    num_sequences: int
    num_decodes: int
    num_logits: int
    table_width: int
    int64: memoryview
    int32: memoryview


_SOCKET_FILE = "ctl"
_BUFFER_BYTES = 4 * 2**20
_MAX_MESSAGE_BYTES = 2**30


class Message(msgspec.Struct, frozen=True, array_like=True):
    """epoch: of the group. step: number of the message in its direction's order; a report has that of its command."""

    epoch: int
    step: int


class Figures(msgspec.Struct, frozen=True, array_like=True):
    """Of loading, 0 while unknown. num_pages: of the KV cache, page 0 included; bytes are those that a rank holds.

    read_bytes, read_seconds: what was read of the checkpoint, and how long that took.
    """

    num_pages: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0


def together(figures: Collection[Figures]) -> Figures:
    """Of a whole group: the pages that every rank has, the sums of bytes, the time of the slowest."""
    return Figures(
        num_pages=min(one.num_pages for one in figures),
        weight_bytes=sum(one.weight_bytes for one in figures),
        kv_bytes_per_token=sum(one.kv_bytes_per_token for one in figures),
        read_bytes=sum(one.read_bytes for one in figures),
        read_seconds=max(one.read_seconds for one in figures),
    )


class Agreed(Message, frozen=True, tag="agreed", array_like=True):
    """Every rank is here: what they hold together."""

    figures: Figures


class RunStep(Message, frozen=True, tag="run", array_like=True):
    """Compute this batch. plan: the scheduler's number of the step, which repeats when it is tried again in parts.

    logits_slices: (first row, number of rows) of further logits to compute after those of the batch. is_probe: say
    first whether it fits (`Capacity`), and wait for `Proceed`. graph: the CUDA graph to replay, which every rank has
    recorded; None to launch kernel by kernel.
    """

    plan: int
    batch: PackedBatch
    logits_slices: list[tuple[int, int]] = []
    is_probe: bool = False
    graph: GraphKey | None = None


class Capture(Message, frozen=True, tag="capture", array_like=True):
    """Record the CUDA graph of this key, and say whether it is there (`Captured`)."""

    graph: GraphKey


class Proceed(Message, frozen=True, tag="proceed", array_like=True):
    """Of a probed step: compute it, or forget it."""

    is_go: bool


class ZeroPages(Message, frozen=True, tag="zero", array_like=True):
    """Overwrite these pages of the KV cache with zeros."""

    pages: list[int]


class FreeMemory(Message, frozen=True, tag="free", array_like=True):
    """Give back what the allocator holds without need."""


class Stop(Message, frozen=True, tag="stop", array_like=True):
    """Leave the loop; nothing follows."""


Command = Agreed | RunStep | Capture | Proceed | ZeroPages | FreeMemory | Stop


class Joined(Message, frozen=True, tag="joined", array_like=True):
    """The first message of a follower."""

    rank: int


class Ready(Message, frozen=True, tag="ready", array_like=True):
    """This rank has come so far in loading, and holds so much."""

    figures: Figures


class Capacity(Message, frozen=True, tag="capacity", array_like=True):
    """max_tokens: the largest step that fits into this rank's free memory, up to the one that was asked about."""

    max_tokens: int


class Captured(Message, frozen=True, tag="captured", array_like=True):
    """is_there: this rank can replay the graph."""

    is_there: bool


Report = Joined | Ready | Capacity | Captured
_R = TypeVar("_R", Joined, Ready, Capacity, Captured)
_C = TypeVar("_C", Agreed, Proceed)

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_report_decoder = msgspec.msgpack.Decoder(Report)


class _Stream:
    """Frames over one connected socket, blocking. Raises `OSError`, `EOFError`, `msgspec.MsgspecError`."""

    def __init__(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connection
        self._buffer = bytearray(64 * 1024)

    def receive(self) -> memoryview:
        """The next payload, valid until the next call."""
        length = int.from_bytes(self._read(4), "little")
        if length > _MAX_MESSAGE_BYTES:
            raise EOFError(f"a message of {length} bytes")
        return self._read(length)

    def _read(self, length: int) -> memoryview:
        if length > len(self._buffer):
            self._buffer = bytearray(2 * length)
        view = memoryview(self._buffer)[:length]
        done = 0
        while done < length:
            received = self._socket.recv_into(view[done:])
            if received == 0:
                raise EOFError("the connection was closed")
            done += received
        return view

    def send(self, frame: bytes | bytearray) -> None:
        self._socket.sendall(frame)

    def close(self) -> None:
        """Wakes whoever reads."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _frame(message: Command | Report) -> bytearray:
    frame = bytearray(4)
    _encoder.encode_into(message, frame, 4)
    frame[:4] = (len(frame) - 4).to_bytes(4, "little")
    return frame


class LeaderLink:
    """Rank 0's end: numbers commands, sends them to all, and takes one report of each where a command asks for it.

    Used by the device thread alone. `listen` comes before the followers may connect, `accept` after.
    """

    def __init__(self, folder: Path, *, epoch: int, world_size: int) -> None:
        self.epoch = epoch
        self.step = 0
        self._num_followers = world_size - 1
        self._followers: dict[int, _Stream] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / _SOCKET_FILE))
        self._listener.listen(world_size)

    def accept(self, *, timeout_s: float) -> None:
        """Wait for every follower. Raises `DeviceError` (`rank_lost`)."""
        deadline = time.monotonic() + timeout_s
        try:
            while len(self._followers) < self._num_followers:
                self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = self._listener.accept()
                connection.settimeout(None)
                stream = _Stream(connection)
                joined = _report_decoder.decode(stream.receive())
                if not isinstance(joined, Joined) or joined.epoch != self.epoch or joined.rank in self._followers:
                    raise DeviceError("stale_message", f"a follower of another group has connected: {joined}")
                self._followers[joined.rank] = stream
        except (OSError, EOFError, msgspec.MsgspecError) as exc:
            missing = sorted(set(range(1, self._num_followers + 1)) - self._followers.keys())
            raise DeviceError("rank_lost", f"ranks {missing} did not join the group: {exc}") from exc
        finally:
            self._listener.close()

    def next_step(self) -> int:
        """The number of the next command."""
        self.step += 1
        return self.step

    def send(self, command: Command) -> None:
        """To every follower. Raises `DeviceError` (`rank_lost`)."""
        frame = _frame(command)
        for rank, stream in self._followers.items():
            try:
                stream.send(frame)
            except OSError as exc:
                raise DeviceError("rank_lost", f"rank {rank} takes no more steps: {exc}") from exc

    def gather(self, kind: type[_R]) -> dict[int, _R]:
        """The report of each follower on the last command, by rank.

        Raises `DeviceError`: `rank_lost`, or `stale_message` for the answer to another command.
        """
        reports: dict[int, _R] = {}
        for rank, stream in self._followers.items():
            try:
                report = _report_decoder.decode(stream.receive())
            except (OSError, EOFError, msgspec.MsgspecError) as exc:
                raise DeviceError("rank_lost", f"rank {rank} is gone: {exc}") from exc
            if not isinstance(report, kind) or (report.epoch, report.step) != (self.epoch, self.step):
                raise DeviceError(
                    "stale_message",
                    f"rank {rank} answered {type(report).__name__} of epoch {report.epoch}, step {report.step}; "
                    f"expected {kind.__name__} of epoch {self.epoch}, step {self.step}",
                )
            reports[rank] = report
        return reports

    def agree(self, own: Figures) -> Figures:
        """Wait until every rank is here; what all hold together. Raises `DeviceError`."""
        others = self.gather(Ready)
        figures = together([own, *(ready.figures for ready in others.values())])
        self.send(Agreed(self.epoch, self.next_step(), figures))
        return figures

    def close(self) -> None:
        """Tell the followers to stop, and hang up."""
        for stream in self._followers.values():
            with contextlib.suppress(OSError):
                stream.send(_frame(Stop(self.epoch, self.step + 1)))
            stream.close()
        self._followers.clear()
        self._listener.close()


class FollowerLink:
    """The other ranks' end. `close` may be called by another thread, and wakes a `receive`."""

    def __init__(self, folder: Path, *, epoch: int, rank: int) -> None:
        """Raises `DeviceError` (`rank_lost`)."""
        self.epoch = epoch
        self.step = 0
        self._is_closed = False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stream = _Stream(connection)
        try:
            connection.connect(str(folder / _SOCKET_FILE))
            self._stream.send(_frame(Joined(epoch, 0, rank)))
        except OSError as exc:
            self._stream.close()
            raise DeviceError("rank_lost", f"rank 0 cannot be reached: {exc}") from exc

    @property
    def is_closed(self) -> bool:
        """True once this end has hung up."""
        return self._is_closed

    def receive(self) -> Command:
        """The next command; its batch is valid until the next call.

        Raises `DeviceError`: `rank_lost` when the connection has ended, `stale_message` for one that is not the
        successor of the last.
        """
        try:
            command: Command = _command_decoder.decode(self._stream.receive())
        except (OSError, EOFError, msgspec.MsgspecError, ValueError) as exc:
            raise DeviceError("rank_lost", f"rank 0 is gone: {exc}") from exc
        if (command.epoch, command.step) != (self.epoch, self.step + 1):
            raise DeviceError(
                "stale_message",
                f"{type(command).__name__} of epoch {command.epoch}, step {command.step} came where epoch "
                f"{self.epoch}, step {self.step + 1} was due",
            )
        self.step += 1
        return command

    def expect(self, kind: type[_C]) -> _C:
        """The next command, which must be of this kind. Raises `DeviceError`."""
        command = self.receive()
        if not isinstance(command, kind):
            raise DeviceError("stale_message", f"{type(command).__name__} came where {kind.__name__} was due")
        return command

    def agree(self, own: Figures) -> Figures:
        """Wait until every rank is here; what all hold together. Raises `DeviceError`."""
        self.report(Ready(self.epoch, self.step, own))
        return self.expect(Agreed).figures

    def report(self, report: Report) -> None:
        """Answer the last command. Raises `DeviceError` (`rank_lost`)."""
        try:
            self._stream.send(_frame(report))
        except OSError as exc:
            raise DeviceError("rank_lost", f"rank 0 is gone: {exc}") from exc

    def close(self) -> None:
        self._is_closed = True
        self._stream.close()
