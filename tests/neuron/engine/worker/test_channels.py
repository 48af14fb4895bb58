from __future__ import annotations

import socket
import threading

import pytest
from neuron.engine.worker.channels import Inbox, Outbox
from neuron.protocol import Cancel


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def read_exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        assert part
        parts += part
    return bytes(parts)


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_commands_come_in_order_and_all_at_once():
    inbox = Inbox()
    for number in range(3):
        inbox.put(Cancel(number))
    assert [command.request_id for command in inbox.take(wait=True)] == [0, 1, 2]
    assert inbox.take(wait=False) == []


@pytest.mark.parametrize("event", [lambda inbox: inbox.put(Cancel(1)), Inbox.wake, Inbox.close])
def test_a_waiting_taker_is_woken(event):
    inbox = Inbox()
    taken = []
    taker = in_thread(lambda: taken.append(inbox.take(wait=True)))
    event(inbox)
    taker.join(10)
    assert len(taken) == 1


def test_a_wake_before_the_wait_is_not_lost():
    inbox = Inbox()
    inbox.wake()
    assert inbox.take(wait=True) == []


def test_a_slow_reader_does_not_hold_up_the_sender_and_gets_everything_in_order(pair):
    ours, theirs = pair
    outbox = Outbox(ours)
    frames = [bytes([number]) * 50_000 for number in range(100)]
    for frame in frames:
        outbox.send(frame)  # far more than the socket's buffer: must not wait for the reader below
    assert read_exactly(theirs, 5_000_000) == b"".join(frames)
    assert outbox.flush(10)


def test_flush_waits_for_the_reader_and_gives_up_at_its_deadline(pair):
    ours, theirs = pair
    outbox = Outbox(ours)
    outbox.send(b"x" * 3_000_000)
    assert not outbox.flush(0.05)
    reader = in_thread(lambda: read_exactly(theirs, 3_000_000))
    assert outbox.flush(10)
    reader.join(10)


def test_a_reader_that_never_reads_stops_the_sender_at_the_limit(pair):
    ours, theirs = pair
    outbox = Outbox(ours, limit_bytes=1_000_000)
    total = 10_000_000
    sent = []

    def send() -> None:
        for _ in range(100):
            outbox.send(b"y" * (total // 100))
            sent.append(1)

    sender = in_thread(send)
    sender.join(0.3)
    assert sender.is_alive() and len(sent) < 100
    assert read_exactly(theirs, total) == b"y" * total
    sender.join(10)
    assert len(sent) == 100


def test_a_closed_socket_frees_whoever_waits(pair):
    ours, theirs = pair
    outbox = Outbox(ours, limit_bytes=1000)
    sender = in_thread(lambda: [outbox.send(b"z" * 1_000_000) for _ in range(5)])
    theirs.close()
    sender.join(10)
    assert not sender.is_alive()
    assert not outbox.flush(10)


def test_dropping_frees_whoever_waits(pair):
    ours, _ = pair
    outbox = Outbox(ours, limit_bytes=1000)
    sender = in_thread(lambda: [outbox.send(b"z" * 1_000_000) for _ in range(5)])
    outbox.drop()
    sender.join(10)
    assert not sender.is_alive()
