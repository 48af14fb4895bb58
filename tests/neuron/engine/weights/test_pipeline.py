"""The ring of blocks between the threads that read and the device, with a device that takes its time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.checkpoint.errors import CheckpointError
from neuron.engine.weights.pipeline import CudaTransfer, HostTransfer, Piece, num_reader_threads, transfer_pieces
from neuron.engine.weights.slices import Runs
from torch import Tensor


class SlowDevice:
    """Copies like a side stream: nothing is there before it is waited for, in order; a block that is filled again
    before its copy was waited for spoils what arrives."""

    block_bytes = 64

    def __init__(self, patience: int) -> None:
        self.patience = patience  # queries until a copy is done by itself
        self.queued: list[SlowCopy] = []
        self.num_blocks = 0
        self.num_sent = 0

    def block(self, num_bytes: int) -> Tensor:
        self.num_blocks += 1
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def send(self, target: Tensor, staged: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> SlowCopy:
        self.num_sent += 1
        copy = SlowCopy(self, target, staged)
        self.queued.append(copy)
        return copy

    def finish(self) -> None:
        for copy in list(self.queued):
            copy.synchronize()


class SlowCopy:
    def __init__(self, device: SlowDevice, target: Tensor, staged: Tensor) -> None:
        self.device, self.target, self.staged = device, target, staged
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        if self.queries > self.device.patience:
            self.synchronize()
        return self not in self.device.queued

    def synchronize(self) -> None:
        while self in self.device.queued:
            copy = self.device.queued.pop(0)
            copy.target.copy_(copy.staged)


@pytest.fixture(scope="module")
def content() -> Iterator[tuple[int, Tensor]]:
    data = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    descriptor = os.memfd_create("content")
    os.write(descriptor, data.numpy().tobytes())
    yield descriptor, data
    os.close(descriptor)


def pieces_of(descriptor: int, targets: list[Tensor], sizes: list[int]) -> list[Piece]:
    pieces, start = [], 0
    for target, size in zip(targets, sizes, strict=True):
        runs = Runs(4 * start, 1, 4 * size, 4 * size)
        pieces.append(Piece(f"tensor {start}", descriptor, (runs,), torch.float32, target))
        start += size
    return pieces


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 16), min_size=1, max_size=40),
    patience=st.integers(0, 3),
    num_threads=st.integers(1, 5),
    half=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_everything_arrives_whole_however_slow_the_device_is(
    content: tuple[int, Tensor], sizes: list[int], patience: int, num_threads: int, half: list[bool]
) -> None:
    descriptor, data = content
    device = SlowDevice(patience)
    targets = [
        torch.zeros(size, dtype=torch.float16 if is_half else torch.float32)
        for size, is_half in zip(sizes, half, strict=False)
    ]
    seen: list[int] = []
    transfer_pieces(pieces_of(descriptor, targets, sizes), device, num_threads=num_threads, on_bytes=seen.append)
    parts = data[: sum(sizes)].split(sizes)
    for target, part in zip(targets, parts, strict=True):
        assert torch.equal(target, part.to(target.dtype))
    assert sorted(seen) == sorted(4 * size for size in sizes)
    assert device.num_blocks <= num_threads + 4
    # What lies in host memory in the file's dtype takes no way round.
    assert device.num_sent == sum(target.dtype == torch.float16 for target in targets)


def test_a_damaged_file_ends_it_with_everything_given_back(content: tuple[int, Tensor]) -> None:
    descriptor, _ = content
    device = SlowDevice(2)
    targets = [torch.zeros(16, dtype=torch.float16) for _ in range(80)]
    with pytest.raises(CheckpointError, match=r"become shorter\): tensor (992|1\d\d\d)$"):
        transfer_pieces(
            pieces_of(descriptor, targets, [16] * 80), device, num_threads=3, on_bytes=lambda num_bytes: None
        )
    assert not device.queued


def test_whatever_a_thread_dies_of_ends_the_load(content: tuple[int, Tensor]) -> None:
    """Not only what reading is known to raise: who waits for the piece would wait for ever."""
    beyond = Piece("beyond", content[0], (Runs(2**70, 1, 4, 4),), torch.float32, torch.empty(1))
    with pytest.raises(OverflowError):
        transfer_pieces([beyond], HostTransfer(), num_threads=1, on_bytes=lambda _: None)


def test_columns_are_copied_out_of_a_larger_matrix(tmp_path: Path) -> None:
    matrix = torch.randn(50, 30)
    file = tmp_path / "matrix"
    file.write_bytes(b"head" + matrix.numpy().tobytes())
    descriptor = os.open(file, os.O_RDONLY)
    runs = Runs(4 + 4 * (30 * 10 + 7), 20, 4 * 5, 4 * 30)
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.zeros(20, 5, dtype=dtype)
        piece = Piece("m", descriptor, (runs,), torch.float32, target)
        transfer_pieces([piece], HostTransfer(), num_threads=2, on_bytes=lambda num_bytes: None)
        assert torch.equal(target, matrix[10:30, 7:12].to(dtype))
    os.close(descriptor)


def test_ranks_share_the_threads() -> None:
    assert 2 <= num_reader_threads(8) <= num_reader_threads(1) <= 8


class FakeCuda:
    """What the transfer asks of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Stream:
            def __init__(self, device: torch.device) -> None: ...

            def wait_stream(self, other: str) -> None:
                log.append(f"wait for {other}")

            def synchronize(self) -> None:
                log.append("synchronize")

        class Event:
            def __init__(self, **options: bool) -> None:
                assert options == {"blocking": True}  # the device thread sleeps, and leaves the core to the readers

            def record(self, stream: Stream) -> None:
                log.append("record")

        @contextmanager
        def stream(side: Stream) -> Iterator[None]:
            log.append("side stream")
            yield
            log.append("ordinary stream")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the ordinary stream")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty cache"))


def test_a_device_gets_its_copies_on_a_side_stream_behind_what_made_the_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    transfer = CudaTransfer(torch.device("cpu"))
    staged = torch.arange(6.0)
    same = torch.zeros(6)
    assert transfer.send(same, staged) is not None
    assert torch.equal(same, staged)
    transfer.finish()
    one_copy = ["side stream", "record", "ordinary stream"]
    assert cuda.log == ["wait for the ordinary stream", *one_copy, "synchronize"]
    other = torch.zeros(6, dtype=torch.bfloat16)
    transfer.send(other, staged)
    assert torch.equal(other, staged.to(torch.bfloat16))
    transfer.finish()
    assert cuda.log[5:] == [*one_copy, "synchronize", "empty cache"]  # scratch of the side stream goes back


@pytest.mark.parametrize("is_in_pairs", [False, True])
def test_readers_decode_what_goes_to_host_memory(is_in_pairs: bool) -> None:
    """A few rows at a time, whatever the piece holds, and in the order of the file whatever the target's."""
    rows, row_bytes = 96, 1_024
    raw = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    descriptor = os.memfd_create("blocks")
    os.write(descriptor, raw.numpy().tobytes())
    seen = []

    def decode(blocks: Tensor) -> Tensor:
        seen.append(tuple(blocks.shape))
        return blocks.float() - 128

    target = torch.empty(rows, row_bytes)
    place = target.view(2, 2, rows // 4, row_bytes).transpose(1, 2) if is_in_pairs else target
    runs = (Runs(0, 1, rows * row_bytes, rows * row_bytes),)
    done = []
    piece = Piece("a", descriptor, runs, torch.uint8, place, decode)
    transfer_pieces([piece] * 3, HostTransfer(), num_threads=2, on_bytes=done.append)
    assert torch.equal(place.reshape(rows, row_bytes), raw.float() - 128) and done == [rows * row_bytes] * 3
    assert sum(shape[0] for shape in seen) == 3 * rows and max(shape[0] for shape in seen) <= 32

    def fail(blocks: Tensor) -> Tensor:
        raise ValueError("no such code")

    broken = Piece("b", descriptor, runs, torch.uint8, place, fail)
    with pytest.raises(ValueError, match="no such code"):
        transfer_pieces([piece, broken, piece], HostTransfer(), num_threads=2, on_bytes=done.append)
    os.close(descriptor)
