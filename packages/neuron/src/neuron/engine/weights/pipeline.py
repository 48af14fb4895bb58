"""Reading a checkpoint with several threads, and bringing what they read to the device while they read on.

Threads copy exactly the bytes that are wanted out of the files, in requests of megabytes. Where a parameter lies in
host memory and has the checkpoint's dtype, they write straight into it. Otherwise they fill blocks of a small ring
(pinned, for a device), and the thread that owns the device (law 2) sends each block on: an asynchronous copy on a side
stream, converted on the device where the dtype differs. Blocks of a quantised type become numbers where these go: by
the readers for host memory, on the device else. A block of the ring is filled again when its copy is done, so memory is
bounded by the ring, and reading, copying and converting overlap.

Files are read through the page cache (no O_DIRECT): a second load, and the other ranks of this one, find them there.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from neuron.checkpoint.errors import CheckpointError
from neuron.engine.weights.slices import Runs

# The longest request: enough for the bus and the disk to be busy, little enough to stay in a CPU's cache.
_DEVICE_BLOCK_BYTES = 8 * 2**20
_HOST_BLOCK_BYTES = 4 * 2**20
_MIN_THREADS, _MAX_THREADS = 2, 8
# Elements that are decoded at once: torch divides no operation on so few among threads (`at::internal::GRAIN_SIZE`).
_ELEMENTS_AT_ONCE = 32_768
# Blocks beyond one for each thread: those that are on their way to the device.
_BLOCKS_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one tensor's slice. label names it in errors; dtype is the file's; target: [rows, ...] of the
    parameter, in its own dtype. decode: what makes numbers, [rows, columns], of rows of blocks, [rows, bytes] uint8;
    the target's elements are theirs, in their order."""

    label: str
    descriptor: int
    runs: tuple[Runs, ...]
    dtype: torch.dtype
    target: Tensor
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(runs.num_bytes for runs in self.runs)

    @property
    def is_decoded_by_readers(self) -> bool:
        """Whether the threads that read make numbers of it: where those go to host memory."""
        return self.decode is not None and self.target.device.type == "cpu"

    def staged(self, block: Tensor) -> Tensor:
        """What has been read into the beginning of a block of memory: rows of blocks, or elements in the target's
        shape."""
        read = block[: self.num_bytes]
        if self.decode is not None:
            return read.view(self.target.numel() // self.target.shape[-1], -1)
        return read.view(self.dtype).view(self.target.shape)

    @property
    def is_direct(self) -> bool:
        """Whether the bytes of the file are the bytes of the parameter."""
        is_same = self.decode is None and self.target.dtype == self.dtype and self.target.is_contiguous()
        return is_same and self.target.device.type == "cpu"


class Pending(Protocol):
    """A copy that is under way (as `torch.cuda.Event`)."""

    def query(self) -> bool:
        """Whether it is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class Transfer(Protocol):
    """The way from a block to a parameter. Used by one thread."""

    block_bytes: int

    def block(self, num_bytes: int) -> Tensor:
        """Host memory, [num_bytes] uint8, that `send` takes parts of."""
        ...

    def send(self, target: Tensor, staged: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Pending | None:
        """Copy (and convert) `staged`, a view of a block; None where that is done at once. decode: see `Piece`."""
        ...

    def finish(self) -> None:
        """Wait until everything sent has arrived and may be used by the thread's ordinary work."""
        ...


class HostTransfer:
    """Into host memory: the calling thread copies and converts, with torch's threads."""

    block_bytes = _HOST_BLOCK_BYTES

    def block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, target: Tensor, staged: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        target.copy_(staged if decode is None else decode(staged).view(target.shape))

    def finish(self) -> None:
        pass


class CudaTransfer:
    """Into a device's memory, from pinned blocks, on a stream of its own."""

    block_bytes = _DEVICE_BLOCK_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # What zeroed the parameters, or used their memory before, was put on the ordinary stream.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._has_scratch = False

    def block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, target: Tensor, staged: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Pending:
        with torch.cuda.stream(self._stream):
            if decode is not None:
                self._has_scratch = True
                target.copy_(decode(staged.to(self._device, non_blocking=True)).view(target.shape))
            elif staged.dtype == target.dtype:
                target.copy_(staged, non_blocking=True)
            else:
                # The conversion runs on the device; its scratch belongs to this stream and is used in its order.
                self._has_scratch = True
                target.copy_(staged.to(self._device, non_blocking=True))
            event: Pending = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)  # type: ignore[attr-defined]
        return event

    def finish(self) -> None:
        self._stream.synchronize()
        if self._has_scratch:
            torch.cuda.empty_cache()  # no other stream could ever use it


def make_transfer(device: torch.device) -> Transfer:
    """The one for parameters on `device`."""
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()


def num_reader_threads(world_size: int) -> int:
    """Threads that read at once: as many as copying out of the page cache needs to keep a bus busy, shared by ranks."""
    return max(_MIN_THREADS, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // world_size))


def transfer_pieces(
    pieces: Sequence[Piece], transfer: Transfer, *, num_threads: int, on_bytes: Callable[[int], None]
) -> None:
    """Fill every piece's target; returns when all are there. on_bytes: called by this thread after each piece.

    No piece that is not direct may be longer than `transfer.block_bytes`, unless it is a single row; pieces are read in
    about the given order. Raises `CheckpointError` naming the tensor that cannot be read; threads and blocks are gone
    by then.
    """
    staged_bytes = [piece.num_bytes for piece in pieces if not piece.is_direct]
    block_bytes = max(staged_bytes, default=0)
    readers = _Readers(pieces, num_threads=min(num_threads, len(pieces)))
    in_flight: deque[tuple[Pending, Tensor]] = deque()
    try:
        for _ in range(min(num_threads + _BLOCKS_IN_FLIGHT, len(staged_bytes))):
            readers.free.put(transfer.block(block_bytes))  # readers begin with the first while the next is pinned
        for _ in pieces:
            while in_flight and (in_flight[0][0].query() or readers.done.empty()):
                # Nothing is read that could be sent, perhaps because every block is on its way.
                pending, block = in_flight.popleft()
                pending.synchronize()
                readers.free.put(block)
            piece, block_or_none, error = readers.done.get()
            if error is not None:
                raise error
            if block_or_none is not None:
                sent = transfer.send(piece.target, piece.staged(block_or_none), piece.decode)
                if sent is None:
                    readers.free.put(block_or_none)
                else:
                    in_flight.append((sent, block_or_none))
            on_bytes(piece.num_bytes)
    finally:
        readers.stop()
        transfer.finish()


class _Readers:
    """The threads: they take pieces in order, touch host memory only, and hand back what they have read.

    A reader takes a piece before it takes a block, so whoever holds a block is filling it: the thread that empties
    `done` and refills `free` is always enough for everyone to go on.
    """

    def __init__(self, pieces: Sequence[Piece], *, num_threads: int) -> None:
        self.free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[tuple[Piece, Tensor | None, Exception | None]] = queue.SimpleQueue()
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}
        self._is_stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"weights-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when no thread touches any memory any more."""
        self._is_stopped = True
        for _ in self._threads:
            self.free.put(None)
        for thread in self._threads:
            thread.join()
        for mapped in self._maps.values():
            mapped.close()

    def _run(self) -> None:
        while not self._is_stopped:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            block: Tensor | None = None
            memory = piece.target
            if not piece.is_direct:
                block = self.free.get()
                if block is None:
                    return
                memory = block[: piece.num_bytes]
            error: Exception | None = None
            try:
                self._read(piece, memory.reshape(-1).view(torch.uint8).numpy())
            except (OSError, ValueError) as exc:
                error = CheckpointError(f"its file cannot be read ({exc})", tensors=[piece.label])
            except Exception as exc:  # whoever waits for this piece would wait for ever
                error = exc
            if block is not None and piece.is_decoded_by_readers:
                error = error or _decoded(piece, block)
                self.free.put(block)
                block = None
            self.done.put((piece, block, error))

    def _read(self, piece: Piece, memory: np.ndarray) -> None:
        start = 0
        for runs in piece.runs:
            part = memory[start : start + runs.num_bytes]
            start += runs.num_bytes
            span = runs.pitch * (runs.num_runs - 1) + runs.run_bytes
            # The whole request at once, so that a disk sees it as one and not as the kernel's short looks ahead.
            os.posix_fadvise(piece.descriptor, runs.offset, span, os.POSIX_FADV_WILLNEED)
            if runs.num_runs == 1:
                _read_fully(piece.descriptor, part.data, runs.offset)
            else:
                self._copy_runs(piece.descriptor, runs, span, part.reshape(runs.num_runs, runs.run_bytes))

    def _copy_runs(self, descriptor: int, runs: Runs, span: int, part: np.ndarray) -> None:
        """Columns of a matrix, out of a mapping: a system call for each row would cost more than the row."""
        if os.fstat(descriptor).st_size < runs.offset + span:
            raise OSError("it has become shorter")  # touching the mapping there would end the process
        with self._lock:
            mapped = self._maps.get(descriptor)
            if mapped is None:
                mapped = self._maps[descriptor] = mmap.mmap(
                    # Shared ones of sealed memory are refused before Linux 6.7, even for reading.
                    descriptor,
                    0,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ,
                )
        rows = np.ndarray(part.shape, np.uint8, mapped, runs.offset, (runs.pitch, 1))
        np.copyto(part, rows)


def _decoded(piece: Piece, block: Tensor) -> Exception | None:
    """Fill a piece's target from what has been read, a few rows at a time: so few that no operation calls on torch's
    own threads, of which each reader would get as many as there are processors, and that all stays in the cache."""
    assert piece.decode is not None
    staged = piece.staged(block)
    try:
        with torch.inference_mode(False), torch.no_grad():
            row = 0
            for part in _parts(piece.target, _ELEMENTS_AT_ONCE):
                end = row + part.numel() // part.shape[-1]
                part.copy_(piece.decode(staged[row:end]).view(part.shape))
                row = end
    except Exception as exc:  # whoever waits for this piece would wait for ever
        return exc
    return None


def _parts(target: Tensor, num_elements: int) -> Iterator[Tensor]:
    """Views of a tensor of rows, in their order, of about so many elements each; a row is not cut."""
    size = target.numel() // target.shape[0]
    if target.dim() > 2 and size > num_elements:
        for inner in target:
            yield from _parts(inner, num_elements)
        return
    rows = max(1, num_elements // size)
    for row in range(0, target.shape[0], rows):
        yield target[row : row + rows]


def _read_fully(descriptor: int, memory: memoryview, offset: int) -> None:
    """Raises `OSError`."""
    done = 0
    while done < len(memory):
        received = os.preadv(descriptor, [memory[done:]], offset + done)
        if received == 0:
            raise OSError("it has become shorter")
        done += received
