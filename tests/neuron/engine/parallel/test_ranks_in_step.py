"""Two ranks with overlap and graphs: the one that samples nothing computes the same tokens, from what it is told."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
import torch
from neuron.engine.errors import DeviceError
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.parallel.messages import FollowerLink, GraphKey, LeaderLink
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.follower import Follower
from neuron.engine.step.leader import StepLeader
from neuron.engine.step.runner import Launching, ModelRunner, StepRanks
from neuron.protocol import GrammarSpec
from torch import Tensor

from tests.neuron.engine.graph_device import FakeGraphDevice, choose
from tests.neuron.engine.lazy_stream import LazyStream
from tests.neuron.engine.step.harness import KINDS, drive, same, with_grammars
from tests.neuron.engine.toy import (
    CPU,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    PAGE,
    VOCAB,
    Answers,
    ToyAttention,
    ToyModel,
    request,
)

LIMITS = {"max_step_tokens": 32, "max_running": 8, "max_model_len": 200}
NUM_PAGES = 45


class PipedGroup(ParallelGroup):
    """Both ranks hold the whole model; tokens go through a queue."""

    def __init__(self, rank: int, pipe: queue.Queue[Tensor]) -> None:
        super().__init__(rank, 2)
        self._pipe = pipe

    def broadcast(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            self._pipe.put(x.clone())
        else:
            sent = self._pipe.get(timeout=60)
            assert sent.shape == x.shape, "the ranks disagree about the rows of a step"
            x.copy_(sent)
        return x


class Pair:
    """A leader's engine, and a follower on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.pipe: queue.Queue[Tensor] = queue.Queue()
        self.devices = [FakeGraphDevice(), FakeGraphDevice()]
        leader = LeaderLink(folder, epoch=0, world_size=2)
        link = FollowerLink(folder, epoch=0, rank=1)
        leader.accept(timeout_s=30)
        self.runners = [self._runner(rank, StepLeader(leader) if rank == 0 else None) for rank in range(2)]
        self.engine = with_grammars(Engine(self.runners[0]))
        self.follower = Follower(self.runners[1], link)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _runner(self, rank: int, leader: StepLeader | None) -> ModelRunner:
        runner = ModelRunner(
            ToyModel(),
            PagedKV(KVLayout.uniform(NUM_LAYERS, NUM_HEADS, HEAD_DIM, PAGE, torch.float32), NUM_PAGES, CPU),
            ToyAttention(),
            vocab_size=VOCAB,
            limits=StepLimits(**LIMITS),
            launching=Launching(LazyStream() if rank == 0 else None, overlaps=True, graphs=self.devices[rank]),
            ranks=StepRanks(PipedGroup(rank, self.pipe), leader),
        )
        runner._sampling_kernel = choose
        return runner

    def _follow(self) -> None:
        try:
            self.follower.run()
        except Exception as exc:
            self.error = exc

    def end(self) -> None:
        self.engine.close()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.follower.close()


def test_the_follower_writes_the_cache_that_the_leader_writes(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    engine = pair.engine
    items = [
        request(
            number,
            range(number, number + 5 + 3 * number),
            12,
            sampling=KINDS[number],
            grammar=GrammarSpec("9") if number == 3 else None,
        )
        for number in range(6)
    ]
    answers = Answers()
    for item in items[:3]:
        engine.add(item)
    drive(engine, answers)
    while engine.has_idle_work:
        engine.work_while_idle()
    for item in items[3:]:
        engine.add(item)
    drive(engine, answers)
    graphs = [runner.graphs for runner in pair.runners]
    assert engine.stats().graph_steps > 5
    assert graphs[0] is not None and graphs[1] is not None
    assert graphs[0].captured == graphs[1].captured, "in the same order"
    pair.end()
    assert pair.error is None
    for item in items:
        same(item, answers)
    for index in range(NUM_LAYERS):
        ours, theirs = (runner.kv.layer(index)[1:] for runner in pair.runners)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)  # another token's would be far away
    assert pair.pipe.empty(), "every broadcast has both its ends"


def test_a_graph_that_one_rank_cannot_record_is_used_by_none(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.devices[1].refuses = {2}
    engine, runner = pair.engine, pair.runners[0]
    assert runner.graphs is not None
    keys = list(runner.graphs._queue)
    while engine.has_idle_work:
        engine.work_while_idle()
    assert runner.graphs.captured == [key for key in keys if key != keys[1]]
    pair.end()
    assert pair.error is None


def test_a_follower_is_never_made_to_replay_what_it_has_not_recorded(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    engine, runner = pair.engine, pair.runners[0]
    assert runner.graphs is not None
    key = GraphKey(1, LIMITS["max_model_len"], "tokens")
    assert runner.graphs.record(key), "here alone"
    engine.add(request(0, [1, 2], 4))
    answers = Answers()
    drive(engine, answers)
    pair._thread.join(60)
    assert isinstance(pair.error, DeviceError) and "has not recorded" in pair.error.message


def test_a_shortage_makes_every_rank_give_its_graphs_up(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    engine = pair.engine
    while engine.has_idle_work:
        engine.work_while_idle()
    pair.runners[0].free_memory()
    pair.end()
    assert pair.error is None
    for device in pair.devices:
        assert device.events.count("release pool") == 2, "at the shortage, and at the end"


@pytest.mark.parametrize("has_failed", [True, False])
def test_tokens_are_shared_even_where_sampling_fails(tmp_path: Path, has_failed: bool) -> None:
    pair = Pair(tmp_path)
    engine = pair.engine
    calls = []
    draw = pair.runners[0]._sampler.draw

    def flaky(*arguments: object, **fields: object):
        calls.append(1)
        if has_failed and len(calls) in (2, 5):
            raise RuntimeError("shape mismatch")
        return draw(*arguments, **fields)

    pair.runners[0]._sampler.draw = flaky
    items = [request(number, range(number, number + 6), 8, sampling=KINDS[3]) for number in range(2)]
    answers = Answers()
    for item in items:
        engine.add(item)
    drive(engine, answers)
    pair.end()
    assert pair.error is None and pair.pipe.empty()
    for item in items:
        same(item, answers)
