"""Step plans from rank 0 to the others: in order, of this epoch, or not at all."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from neuron.engine.errors import DeviceError
from neuron.engine.loading.loading import load_engine, load_follower
from neuron.engine.parallel.messages import (
    Capacity,
    Figures,
    FollowerLink,
    LeaderLink,
    PackedBatch,
    Proceed,
    Ready,
    RunStep,
    Stop,
    ZeroPages,
)
from neuron.engine.step.engine import Engine
from neuron.engine.step.leader import StepLeader, StepTooLarge
from neuron.protocol import EngineConfig, Generate, SamplingParams

from tests.neuron.engine.checkpoints import write_qwen3

EPOCH = 5
BATCH = PackedBatch(1, 1, 0, 1, 1, memoryview(b"\1" * 8), memoryview(b"\2" * 4))


@pytest.fixture
def links(tmp_path: Path) -> Iterator[tuple[LeaderLink, FollowerLink]]:
    leader = LeaderLink(tmp_path, epoch=EPOCH, world_size=2)
    follower = FollowerLink(tmp_path, epoch=EPOCH, rank=1)
    leader.accept(timeout_s=10)
    yield leader, follower
    follower.close()
    leader.close()


def zero(link: LeaderLink, *, epoch: int = EPOCH, step: int | None = None) -> None:
    link.send(ZeroPages(epoch, link.next_step() if step is None else step, [3]))


def test_commands_arrive_as_they_were_sent(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    zero(leader)
    leader.send(RunStep(EPOCH, leader.next_step(), 8, BATCH, [(0, 2)], True))
    assert follower.receive() == ZeroPages(EPOCH, 1, [3])
    received = follower.receive()
    assert isinstance(received, RunStep)
    assert (received.plan, received.logits_slices, received.is_probe) == (8, [(0, 2)], True)
    assert bytes(received.batch.int64) == b"\1" * 8 and bytes(received.batch.int32) == b"\2" * 4
    leader.close()
    assert follower.receive() == Stop(EPOCH, 3)


def test_a_large_batch_arrives_whole(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    payload = bytes(range(256)) * 2**14
    large = PackedBatch(1, 1, 0, 1, 1, memoryview(payload), memoryview(b""))
    sender = threading.Thread(target=lambda: leader.send(RunStep(EPOCH, leader.next_step(), 1, large)))
    sender.start()
    received = follower.receive()
    sender.join()
    assert isinstance(received, RunStep) and bytes(received.batch.int64) == payload


@pytest.mark.parametrize(("epoch", "step"), [(EPOCH - 1, 2), (EPOCH, 1), (EPOCH, 3)], ids=["epoch", "stale", "skipped"])
def test_F2_a_message_that_is_not_the_next_is_never_taken_for_it(
    links: tuple[LeaderLink, FollowerLink], epoch: int, step: int
) -> None:
    leader, follower = links
    zero(leader)
    follower.receive()
    zero(leader, epoch=epoch, step=step)
    with pytest.raises(DeviceError) as caught:
        follower.receive()
    assert caught.value.kind == "stale_message"
    assert f"epoch {epoch}, step {step} came where epoch {EPOCH}, step 2 was due" in caught.value.message


def test_F2_an_answer_to_another_command_is_never_taken_for_this_one(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    leader.next_step()
    follower.report(Capacity(EPOCH, 0, 64))
    with pytest.raises(DeviceError) as caught:
        leader.gather(Capacity)
    assert caught.value.kind == "stale_message"


def test_an_answer_of_another_kind_is_refused(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    follower.report(Ready(EPOCH, 0, Figures()))
    with pytest.raises(DeviceError, match="rank 1 answered Ready"):
        leader.gather(Capacity)
    zero(leader)
    with pytest.raises(DeviceError, match="ZeroPages came where Proceed was due"):
        follower.expect(Proceed)


def test_the_end_of_one_side_is_an_error_on_the_other(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    follower.close()
    with pytest.raises(DeviceError, match="rank 1 is gone"):
        leader.gather(Capacity)
    with pytest.raises(DeviceError, match="rank 0 is gone"):
        follower.receive()


def test_a_follower_of_another_epoch_is_not_let_in(tmp_path: Path) -> None:
    leader = LeaderLink(tmp_path, epoch=EPOCH, world_size=2)
    stranger = FollowerLink(tmp_path, epoch=EPOCH - 1, rank=1)
    with pytest.raises(DeviceError, match="another group"):
        leader.accept(timeout_s=10)
    stranger.close()
    leader.close()


def test_followers_that_do_not_come_are_named(tmp_path: Path) -> None:
    leader = LeaderLink(tmp_path, epoch=EPOCH, world_size=3)
    present = FollowerLink(tmp_path, epoch=EPOCH, rank=2)
    with pytest.raises(DeviceError, match=r"ranks \[1\] did not join"):
        leader.accept(timeout_s=0.1)
    present.close()
    with pytest.raises(DeviceError, match="rank 0 cannot be reached"):
        FollowerLink(tmp_path / "elsewhere", epoch=EPOCH, rank=1)


def test_what_ranks_hold_together_is_the_least_pages_and_all_bytes(links: tuple[LeaderLink, FollowerLink]) -> None:
    leader, follower = links
    outcome: list[Figures] = []
    other = threading.Thread(target=lambda: outcome.append(follower.agree(Figures(90, 1000, 8))))
    other.start()
    assert leader.agree(Figures(70, 3000, 24)) == Figures(70, 4000, 32)
    other.join()
    assert outcome == [Figures(70, 4000, 32)]


def test_only_a_step_larger_than_any_before_is_asked_about(links: tuple[LeaderLink, FollowerLink]) -> None:
    link, follower = links
    leader = StepLeader(link)
    leader.completed(1, 1)
    leader.launch(1, BATCH, [], lambda tokens, rows: pytest.fail("nobody needs to be asked"))
    command = follower.receive()
    assert isinstance(command, RunStep) and not command.is_probe
    leader.free_memory()
    follower.receive()
    follower.report(Capacity(EPOCH, 3, 1))
    leader.launch(2, BATCH, [], lambda tokens, rows: tokens)
    command = follower.receive()
    assert isinstance(command, RunStep) and command.is_probe
    assert follower.expect(Proceed).is_go


@pytest.mark.parametrize("short", [0, 1])
def test_F4_a_step_that_does_not_fit_on_one_rank_is_begun_by_none(
    links: tuple[LeaderLink, FollowerLink], short: int
) -> None:
    link, follower = links
    leader = StepLeader(link)
    follower.report(Capacity(EPOCH, 1, 0 if short == 1 else 1))
    with pytest.raises(StepTooLarge, match=f"rank {short} has room for a step of 0 tokens, not of 1"):
        leader.launch(1, BATCH, [], lambda tokens, rows: 0 if short == 0 else tokens)
    follower.receive()
    assert not follower.expect(Proceed).is_go


# ---------------------------------------------------------------- real ranks

PROMPT = [(7 * index) % 300 for index in range(60)]


def _config(folder: str, world_size: int) -> EngineConfig:
    return EngineConfig(
        model_id="tiny",
        path=f"{folder}/model",
        tensor_parallel_size=world_size,
        group_dir=folder if world_size > 1 else "",
        kv_cache_tokens=256,
        page_size=4,
        max_step_tokens=64,
        num_threads=1,
    )


def _answer(engine: Engine) -> list[int]:
    engine.add(Generate(1, PROMPT, SamplingParams(temperature=0.0), 8))
    tokens: list[int] = []
    while not engine.is_idle:
        output = engine.step()
        assert output is not None and not output.failures, output
        tokens += [token for update in output.updates for token in update.token_ids]
    return tokens


def _left_cleanly(work: Callable[..., None]) -> Callable[..., None]:
    """A process of ours ends through the interpreter, where gloo's threads may abort it; engines leave it at once."""

    @functools.wraps(work)
    def run(rank: int, *args: Any) -> None:
        work(rank, *args)
        dist.destroy_process_group()

    return run


@_left_cleanly
def _skip_a_message(rank: int, folder: str) -> None:
    if rank:
        follower = load_follower(_config(folder, 2), rank=1)
        follower._runner.follow = lambda *_: pytest.fail("computed")  # type: ignore[method-assign]
        with pytest.raises(DeviceError) as caught:
            follower.run()
        assert caught.value.kind == "stale_message"
        follower._link.close()
        return
    engine, _ = load_engine(_config(folder, 2))
    leader = engine._runner._leader
    assert leader is not None
    leader._link.next_step()  # a message that is never sent
    with pytest.raises(DeviceError):
        _answer(engine)


class _ShortMemory:
    """Has room for 20 tokens, and says so."""

    def max_tokens(self, num_tokens: int, num_rows: int) -> int:
        return min(num_tokens, 20)


@_left_cleanly
def _short_of_memory(rank: int, folder: str, expected: list[int]) -> None:
    if rank == 0:
        engine, _ = load_engine(_config(folder, 2))
        assert _answer(engine) == expected
        engine.close()
        return
    follower = load_follower(_config(folder, 2), rank=1)
    runner, sizes = follower._runner, []
    runner._memory = _ShortMemory()  # type: ignore[assignment]
    follow = runner.follow

    def watched(batch, slices, graph=None):  # type: ignore[no-untyped-def]
        sizes.append(batch.num_tokens)
        follow(batch, slices, graph)

    runner.follow = watched  # type: ignore[method-assign]
    follower.run()
    assert max(sizes) <= 20 and sum(sizes) == len(PROMPT) + 8 - 1, sizes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("control") / "model")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_F2_a_rank_that_missed_a_message_ends_and_computes_nothing(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    mp.spawn(_skip_a_message, args=(str(tmp_path),), nprocs=2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_F4_a_rank_short_of_memory_makes_all_take_smaller_steps(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    engine, _ = load_engine(_config(str(tmp_path), 1))
    expected = _answer(engine)
    engine.close()
    mp.spawn(_short_of_memory, args=(str(tmp_path), expected), nprocs=2)


def test_a_socket_left_behind_is_not_reused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "ctl"))
        with pytest.raises(OSError, match="in use"):
            LeaderLink(tmp_path, epoch=EPOCH, world_size=2)
