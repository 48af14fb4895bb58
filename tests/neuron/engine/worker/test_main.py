"""The thread that reads the daemon's frames, and the end of a worker."""

from __future__ import annotations

import threading

from neuron.protocol import Loaded, Ping, Pong, Shutdown

from tests.neuron.engine.toy import ToyModel, request, toy_engine
from tests.neuron.engine.worker.harness import CONFIG, LOADED, Session


def test_the_end_of_the_socket_ends_the_engine_mid_work(start):
    session = start()
    session.daemon.receive()
    session.daemon.send(request(0, range(20), 150))
    session.daemon.receive()
    session.daemon.close()
    assert session.wait_for_exit() == 0


def test_a_frame_that_does_not_decode_ends_the_engine(start):
    session = start()
    session.daemon.receive()
    session.daemon._socket.sendall(b"\x03\x00\x00\x00abc")
    assert session.wait_for_exit() == 3


def test_F12_pings_are_answered_while_the_device_thread_is_stuck(monkeypatch):
    model = ToyModel()
    is_stuck, may_go_on = threading.Event(), threading.Event()

    def hang(batch):
        is_stuck.set()
        may_go_on.wait()

    model.on_forward = hang
    session = Session(monkeypatch, lambda config, progress: (toy_engine(model), LOADED))
    session.daemon.send(CONFIG, request(1, [1, 2], 2))
    session.daemon.until(lambda frame: isinstance(frame, Loaded))
    assert is_stuck.wait(20)
    session.daemon.send(Ping(7), Ping(8))
    assert [session.daemon.receive(), session.daemon.receive()] == [Pong(7), Pong(8)]
    may_go_on.set()
    session.daemon.send(Shutdown())
    assert session.wait_for_exit() == 0
