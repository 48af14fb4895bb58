"""The engine's updates become events, each choice by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.events import Event, Finish, TextDelta
from cortex_core.hop import LoggedTokens
from neuron.daemon.api.generation_events import GenerationEvents
from neuron.daemon.text.prompts import Choice, Prompt
from neuron.protocol import SamplingParams, SequenceUpdate

from tests.neuron.daemon.api.harness import CHAT, COMPLETIONS, RunningNeuron, body_for, spelled
from tests.neuron.scripted_engine import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_choices_have_their_own_index_and_one_prompt(neuron: RunningNeuron) -> None:
    _, _, one = await neuron.post(CHAT, neuron.chat())
    status, _, body = await neuron.post(CHAT, neuron.chat(n=3))
    answer = json.loads(body)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 9 and usage["prompt_tokens"] == json.loads(one)["usage"]["prompt_tokens"]


async def test_several_prompts_are_several_choices(neuron: RunningNeuron) -> None:
    status, _, body = await neuron.post(COMPLETIONS, body_for(neuron, COMPLETIONS, prompt=["a", "b"]))
    assert status == 200, body
    assert [choice["index"] for choice in json.loads(body)["choices"]] == [0, 1]


async def test_a_stop_string_ends_the_sequence_in_the_engine(neuron: RunningNeuron) -> None:
    stop = spelled(neuron, [104]).strip()
    status, _, body = await neuron.post(COMPLETIONS, body_for(neuron, COMPLETIONS, max_tokens=3000, stop=[stop]))
    answer = json.loads(body)
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
    assert stop not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] < 3000
    await eventually(lambda: neuron.served.stats.running == 0)


async def test_asking_for_nothing_still_computes_the_prompt(neuron: RunningNeuron) -> None:
    request = body_for(neuron, COMPLETIONS, max_tokens=0, echo=True, prompt="hello")
    status, _, body = await neuron.post(COMPLETIONS, request)
    answer = json.loads(body)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == "hello" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


class Stream:
    """Text of one choice: each id is a letter, and `9` is where its stop string ends."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.completion_tokens = self.reasoning_tokens = 0
        self.is_done = False

    def begin(self, prompt_logprobs: object) -> list[Event]:
        return [TextDelta(self.choice, "^")]

    def feed(self, token_ids: list[int], logprobs: object) -> list[Event]:
        self.completion_tokens += len(token_ids)
        self.is_done = self.is_done or 9 in token_ids
        return [TextDelta(self.choice, "".join(map(str, token_ids)))]

    def finish(self, reason: Any) -> list[Event]:
        return [Finish(self.choice, reason)]


class Text:
    """Makes the streams of a request."""

    def event_stream(self, request: Request, prompt: Prompt, choice: int, *, answer_id: str) -> Stream:
        return Stream(choice)


class Engine:
    """As much of a generation and of a record as events have to do with."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.finish: list[str] = []
        self.num_tokens = 0

    def end_choice(self, index: int) -> None:
        self.ended.append(index)

    def tokens_came(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


def events_of(engine: Any, *, per_prompt: int = 2, max_tokens: int = 5) -> GenerationEvents:
    prompts = [Prompt([1, 2, 3], ""), Prompt([1] * 5, "")]
    choices = [
        Choice(index, prompts[index // per_prompt], SamplingParams(), max_tokens, ()) for index in range(2 * per_prompt)
    ]
    text: Any = Text()
    return GenerationEvents(text, Request("m", num_choices=per_prompt), choices, engine, answer_id="a")


async def test_a_prompt_that_choices_share_is_counted_once_and_so_is_what_was_cached_of_it() -> None:
    engine: Any = Engine()
    events = events_of(engine)
    events.feed([(index, SequenceUpdate(0, [7], cached_tokens=2)) for index in range(4)], engine)
    usage = events.usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (8, 4, 4)
    assert events.needs() == [(3, 5), (5, 5)] and engine.num_tokens == 1, "the most that one choice got"


async def test_a_choice_that_is_done_is_ended_in_the_engine_and_hears_nothing_more() -> None:
    engine: Any = Engine()
    events = events_of(engine)
    made = events.feed([(1, SequenceUpdate(0, [7])), (1, SequenceUpdate(0, [9])), (1, SequenceUpdate(0, [8]))], engine)
    assert made == [TextDelta(1, "^"), TextDelta(1, "7"), TextDelta(1, "9"), Finish(1, "stop")]
    assert (engine.ended, engine.finish, events.output_lens()) == ([1], ["stop"], [2])
    assert events.num_generated == 2 and events.frames()[0] == [0, 2, 3]


async def test_a_chunk_of_the_prompt_shows_nothing() -> None:
    engine: Any = Engine()
    assert events_of(engine).feed([(0, SequenceUpdate(0, [], cached_tokens=2))], engine) == []


async def test_a_stream_that_goes_on_here_begins_behind_what_was_computed_elsewhere() -> None:
    engine: Any = Engine()
    events = events_of(engine)
    events.replay([LoggedTokens(0, [7, 8]), LoggedTokens(1, [7], "length"), LoggedTokens(2, [], None, 3)])
    choices, frames = events.frames()
    assert choices == [0, 2, 3] and [frame.output_ids for frame in frames] == [(7, 8), (), ()]
    events.feed([(2, SequenceUpdate(0, [7], cached_tokens=0))], engine)
    assert events.usage().cached_tokens == 3, "the neuron that began has said what counts"
    with pytest.raises(ValueError, match="no choice 4"):
        events.replay([LoggedTokens(4, [1])])


async def test_asking_for_nothing_asks_the_engine_for_a_token_that_nobody_sees() -> None:
    engine: Any = Engine()
    events = events_of(engine, max_tokens=0)
    assert {frame.max_tokens for frame in events.frames()[1]} == {1}
    made = events.feed([(0, SequenceUpdate(0, [7], "stop"))], engine)
    assert made == [TextDelta(0, "^"), Finish(0, "length")]
