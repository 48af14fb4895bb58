"""One model over one cache: plans go to the device, and results come back by chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.engine.errors import DeviceError
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.runner import ChunkResult, Launching, ModelRunner, StepRanks
from neuron.protocol import Generate, SamplingParams

from tests.neuron.engine.lazy_stream import LazyStream
from tests.neuron.engine.toy import (
    CPU,
    GREEDY,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    PAGE,
    VOCAB,
    ToyAttention,
    ToyModel,
    answer_alone,
)

PROMPT = [7, 3, 9, 4, 1, 8]


def new_runner(model: ToyModel | None = None, *, stream: LazyStream | None = None, leader: Any = None) -> ModelRunner:
    layout = KVLayout.uniform(NUM_LAYERS, NUM_HEADS, HEAD_DIM, PAGE, torch.float32)
    return ModelRunner(
        model or ToyModel(),
        PagedKV(layout, 20, CPU),
        ToyAttention(),
        vocab_size=VOCAB,
        limits=StepLimits(32, 8, 64),
        launching=Launching(stream, overlaps=stream is not None),
        ranks=StepRanks(leader=leader),
    )


def sequence_of(number: int, sampling: SamplingParams = GREEDY, prompt: list[int] = PROMPT, **fields: Any) -> Sequence:
    made = Sequence(Generate(number, prompt, sampling, 9, **fields), number)
    made.pages.extend(range(1 + 4 * number, 5 + 4 * number))
    return made


def plan_of(*chunks: Chunk, step: int = 1) -> StepPlan:
    return StepPlan(step, list(chunks), 0, sum(chunk.num_tokens for chunk in chunks))


def token_of(result: ChunkResult) -> int:
    (sampled,) = result.sampled
    return sampled.token


def test_each_chunk_has_its_result_in_its_place() -> None:
    first, second, third = (sequence_of(number) for number in range(3))
    results = new_runner().execute(plan_of(Chunk(first, 0, 6, 1), Chunk(second, 0, 4, 0), Chunk(third, 0, 6, 1)))
    assert [result.chunk.sequence for result in results] == [first, second, third]
    assert [len(result.sampled) for result in results] == [1, 0, 1]
    assert token_of(results[0]) == token_of(results[2]) == answer_alone(PROMPT, 1)[0]


def test_several_tokens_of_one_chunk_are_sampled_where_they_stand() -> None:
    (result,) = new_runner().execute(plan_of(Chunk(sequence_of(0), 0, 6, 3)))
    assert [each.token for each in result.sampled] == [answer_alone(PROMPT[:end], 1)[0] for end in (4, 5, 6)]


def test_a_plan_that_is_repeated_writes_the_same_cells_and_gives_the_same_tokens() -> None:
    runner = new_runner()
    plan = plan_of(Chunk(sequence_of(0), 0, 6, 1))
    first = token_of(runner.execute(plan)[0])
    cells = [runner.kv.layer(index).clone() for index in range(NUM_LAYERS)]
    assert token_of(runner.execute(plan)[0]) == first
    assert all(torch.equal(runner.kv.layer(index), cells[index]) for index in range(NUM_LAYERS))


def test_log_probabilities_of_a_prompt_are_those_of_its_next_tokens() -> None:
    sequence = sequence_of(0, SamplingParams(temperature=0.0, logprobs=1), prompt_logprobs=True)
    (result,) = new_runner().execute(plan_of(Chunk(sequence, 0, 6, 1)))
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(PROMPT) - 1
    best = answer_alone(PROMPT[:3], 1)[0]
    assert result.prompt_logprobs[2].top_ids == [best]


def test_nothing_is_computed_before_somebody_waits_for_it() -> None:
    model, stream = ToyModel(), LazyStream()
    seen: list[int] = []
    model.on_forward = lambda batch: seen.append(batch.num_tokens)  # type: ignore[assignment,return-value]
    runner = new_runner(model, stream=stream)
    in_flight = runner.launch(plan_of(Chunk(sequence_of(0), 0, 6, 1)))
    assert not seen
    assert token_of(runner.collect(in_flight)[0]) == answer_alone(PROMPT, 1)[0] and seen == [6]


def test_a_step_takes_its_input_from_the_one_below_it() -> None:
    stream, expected = LazyStream(), answer_alone(PROMPT, 2)
    runner, sequence = new_runner(stream=stream), sequence_of(0)
    first = runner.launch(plan_of(Chunk(sequence, 0, 6, 1)))
    sequence.num_pending = 1
    chained = StepPlan(2, [Chunk(sequence, 6, 1, 1, carry_row=0)], 1, 1, is_chained=True)
    second = runner.launch(chained)
    assert [token_of(runner.collect(each)[0]) for each in (first, second)] == expected


def broken(text: str) -> ToyModel:
    model = ToyModel()

    def fail(batch: object) -> None:
        raise RuntimeError(text)

    model.on_forward = fail  # type: ignore[assignment]
    return model


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    model = broken("shape error")
    runner = new_runner(model)
    plan = plan_of(Chunk(sequence_of(0), 0, 6, 1))
    with pytest.raises(RuntimeError, match="shape error"):
        runner.execute(plan)
    model.on_forward = lambda batch: None
    assert token_of(runner.execute(plan)[0]) == answer_alone(PROMPT, 1)[0]


@pytest.mark.parametrize(("text", "is_raised"), [("shape error", False), ("CUDA error: device-side assert", True)])
def test_of_a_step_that_nobody_wants_only_the_end_of_the_device_is_told(text: str, is_raised: bool) -> None:
    runner = new_runner(broken(text), stream=LazyStream())
    in_flight = runner.launch(plan_of(Chunk(sequence_of(0), 0, 6, 1)))
    if is_raised:
        with pytest.raises(RuntimeError, match=text):
            runner.abandon(in_flight)
    else:
        runner.abandon(in_flight)


def test_a_failure_under_other_ranks_is_the_end_of_the_group() -> None:
    """They may wait in a collective of the step, where nothing but the end of this rank frees them."""

    class Leader:
        def __init__(self) -> None:
            self.told: list[int] = []

        def launch(self, step: int, *arguments: object, **options: object) -> None:
            self.told.append(step)

        def completed(self, *sizes: int) -> None:
            self.told.append(-1)

    leader: Any = Leader()
    with pytest.raises(DeviceError, match="step 5 failed on rank 0: RuntimeError: shape error"):
        new_runner(broken("shape error"), leader=leader).execute(plan_of(Chunk(sequence_of(0), 0, 6, 1), step=5))
    assert leader.told == [5]
