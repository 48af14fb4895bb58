"""The device thread and the reader around it, in this process, with the toy engine instead of a model."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from neuron.engine.errors import ModelError, RequestError
from neuron.engine.loading import loading
from neuron.engine.worker import device_thread
from neuron.engine.worker.channels import Inbox
from neuron.protocol import Cancel, EngineFault, EngineProgress, GrammarSpec, Loaded, LoadFailed, Shutdown, StepOutput

from tests.neuron.engine.toy import Answers, ToyModel, answer_alone, request, toy_engine
from tests.neuron.engine.worker.harness import CONFIG, LOADED, Session


def finished(number: int):
    done = set()

    def condition(frame) -> bool:
        done.update(update.request_id for update in frame.updates if update.finish)
        return len(done) == number

    return condition


def answers_of(frames) -> Answers:
    answers = Answers()
    for frame in frames:
        assert isinstance(frame, StepOutput) and frame.epoch == 3
        answers.take(frame)
    return answers


def test_requests_are_answered_and_the_idle_thread_sleeps(start, monkeypatch):
    takes = []
    take = Inbox.take
    monkeypatch.setattr(
        Inbox, "take", lambda self, *, wait, timeout_s: takes.append(wait) or take(self, wait=wait, timeout_s=timeout_s)
    )
    session = start()
    assert session.daemon.receive() == LOADED
    assert session.threads == ["cpu-dev-0"]
    session.daemon.send(*(request(number, [number, 5], 6) for number in range(5)))
    frames = session.daemon.until(finished(5))
    assert answers_of(frames).tokens == {number: answer_alone([number, 5], 6) for number in range(5)}
    for number in range(10, 20):
        session.daemon.send(Cancel(number))
    session.daemon.send(request(9, [1], 2))
    frames += session.daemon.until(finished(1))
    assert answers_of(frames).tokens[9] == answer_alone([1], 2)
    # It looks for commands once per step and once per arrival, and sleeps in between.
    assert len(takes) <= len(frames) + 5 + 10 + 1 + 1
    session.daemon.send(Shutdown())
    assert session.wait_for_exit() == 0


def test_F3_a_cancelled_request_is_never_mentioned_again_and_its_pages_are_free(start):
    model = ToyModel()
    gate, entered = threading.Semaphore(0), threading.Event()

    def wait(batch) -> None:
        entered.set()
        gate.acquire()

    session = start(lambda config, progress: (toy_engine(model, epoch=3), LOADED))
    session.daemon.receive()
    model.on_forward = wait
    session.daemon.send(request(0, range(20), 100), request(1, [3], 2))
    assert entered.wait(10)
    session.daemon.send(Cancel(0), Cancel(77))
    model.on_forward = lambda batch: None
    gate.release(100)
    frames = session.daemon.until(lambda frame: frame.stats.running == frame.stats.waiting == 0)
    mentions = [index for index, frame in enumerate(frames) for u in frame.updates if u.request_id == 0]
    assert len(mentions) <= 2, "the step in flight and at most one before the cancellation was read"
    assert frames[-1].stats.free_pages == frames[-1].stats.total_pages
    assert answers_of(frames).tokens[1] == answer_alone([3], 2)


def test_a_failed_load_is_reported_with_its_kind(start):
    def load(config, progress):
        progress(EngineProgress("weights", 1, 2))
        raise ModelError("bad_checkpoint", "no such tensor")

    session = start(load)
    assert session.daemon.receive() == EngineProgress("weights", 1, 2)
    assert session.daemon.receive() == LoadFailed(3, "bad_checkpoint", "no such tensor")
    assert session.daemon.receive() is None
    assert session.wait_for_exit() == device_thread.EXIT_LOAD_FAILED


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("surprise"), "internal"), (MemoryError(), "out_of_memory"), (RuntimeError("CUDA error: x"), "device")],
)
def test_unexpected_load_errors_are_classified(start, error, kind):
    def load(config, progress):
        raise error

    frame = start(load).daemon.receive()
    assert isinstance(frame, LoadFailed) and frame.kind == kind


def test_a_lost_device_is_a_fault_and_exit_code_three(start):
    model = ToyModel()

    def explode(batch):
        raise RuntimeError("CUDA error: device-side assert triggered")

    session = start(lambda config, progress: (toy_engine(model, epoch=3), LOADED))
    session.daemon.receive()
    model.on_forward = explode
    session.daemon.send(request(0, [1], 5))
    fault = session.daemon.receive()
    assert isinstance(fault, EngineFault) and (fault.epoch, fault.kind) == (3, "device")
    assert "device-side assert" in fault.message
    assert session.daemon.receive() is None
    assert session.wait_for_exit() == 3


def test_wrong_books_are_rebuilt_when_idle(start):
    engine = toy_engine(epoch=3)
    session = start(lambda config, progress: (engine, LOADED))
    session.daemon.receive()
    engine._pool.allocate(3)  # a leak
    session.daemon.send(request(0, [1], 2))
    session.daemon.until(finished(1))
    session.daemon.send(request(1, [1], 2))
    last = session.daemon.until(finished(1))[-1]
    assert last.stats.free_pages == last.stats.total_pages


def test_while_a_grammar_compiles_the_daemon_hears_from_the_engine(monkeypatch):
    may_compile = threading.Event()
    engine = toy_engine()

    def compile_slowly(*arguments):
        may_compile.wait()
        raise RequestError("invalid_grammar", "no such grammar")

    monkeypatch.setattr(engine._compiler, "compile", compile_slowly)
    monkeypatch.setattr(device_thread, "_SIGN_OF_LIFE_S", 0.01)
    session = Session(monkeypatch, lambda config, progress: (engine, LOADED))
    session.daemon.send(CONFIG, request(1, [1, 2], 2, grammar=GrammarSpec("x")))
    session.daemon.until(lambda frame: isinstance(frame, Loaded))
    for _ in range(3):
        frame = session.daemon.receive()
        assert isinstance(frame, StepOutput) and not frame.updates and not frame.failures and frame.stats.waiting == 1
    may_compile.set()
    frames = session.daemon.until(lambda frame: bool(frame.failures))
    assert frames[-1].failures[0].kind == "invalid_grammar"
    session.daemon.send(Shutdown())
    assert session.wait_for_exit() == 0


def test_what_a_load_leaves_is_out_of_the_garbage_collectors_sight(monkeypatch):
    class Held:
        def __init__(self):
            self.me = self

    def load_engine(config, *, progress):
        rubbish = Held()
        gone.append(weakref.ref(rubbish))
        return Held(), LOADED

    gone = []
    thresholds = gc.get_threshold()
    monkeypatch.setattr(loading, "load_engine", load_engine)
    try:
        engine, _ = device_thread.load(CONFIG, lambda progress: None)
        assert gone[0]() is None  # or it would stay for good
        assert all(engine is not each for each in gc.get_objects())
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    assert any(engine is each for each in gc.get_objects())
