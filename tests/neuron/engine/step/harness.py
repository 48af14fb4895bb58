"""Engines whose grammars need no tokenizer, watched, driven and compared."""

from __future__ import annotations

import numpy as np
import pytest
from neuron.engine.errors import RequestError
from neuron.engine.scheduler.scheduler import StepPlan
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import InFlightStep
from neuron.protocol import Generate, SamplingParams

from tests.neuron.engine.toy import GREEDY, PAGE, Answers, run, toy_engine


class ThirdsGrammar:
    """Admits a third of the tokens, which third depending on all tokens so far; complete after `length` of them."""

    def __init__(self, length: int, output: list[int]) -> None:
        self._length = length
        self._tokens = list(output)

    @property
    def is_complete(self) -> bool:
        return len(self._tokens) >= self._length

    def _admits(self, token: int) -> bool:
        return (token + sum(self._tokens)) % 3 == 0

    def advance(self, token: int) -> bool:
        if not self._admits(token):
            raise RequestError("invalid_grammar", f"token {token} was masked with another state")
        self._tokens.append(token)
        return self.is_complete

    def fill_mask(self, row: np.ndarray) -> None:
        bits = np.array([self._admits(token) for token in range(32 * len(row))])
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)


def with_grammars(engine: Engine) -> Engine:
    """An engine whose grammars need no tokenizer: the text is the length."""
    engine._compiler.submit = lambda grammar, stops, output, on_done: on_done(ThirdsGrammar(int(grammar), output))
    return engine


class PageWatch:
    """Fails the test when a page is given away that a launched step may write."""

    def __init__(self, engine: Engine) -> None:
        self._written: dict[int, list[int]] = {}
        runner, pool = engine._runner, engine._pool
        launch, collect, abandon, allocate = runner.launch, runner.collect, runner.abandon, pool.allocate

        def watched_launch(plan: StepPlan) -> InFlightStep:
            # Before: a launch that fails half-way may write too, but is over when it returns.
            in_flight = launch(plan)
            self._written[id(in_flight)] = [
                chunk.sequence.pages[position // PAGE]
                for chunk in plan.chunks
                for position in range(chunk.start, chunk.start + chunk.num_tokens)
            ]
            return in_flight

        def watched_collect(in_flight: InFlightStep):
            try:
                return collect(in_flight)
            finally:
                self._written.pop(id(in_flight), None)

        def watched_abandon(in_flight: InFlightStep) -> None:
            abandon(in_flight)
            self._written.pop(id(in_flight), None)

        def watched_allocate(number: int) -> list[int]:
            pages = allocate(number)
            under_way = {page for written in self._written.values() for page in written}
            assert not under_way & set(pages), "a page is reused while a launched step may write it"
            return pages

        runner.launch, runner.collect, runner.abandon = watched_launch, watched_collect, watched_abandon
        pool.allocate = watched_allocate


def drive(engine: Engine, answers: Answers) -> None:
    while engine.has_work:
        output = engine.step()
        if output is not None:
            answers.take(output)
        assert engine.check() == []


def alone(item: Generate) -> Answers:
    return run(with_grammars(toy_engine()), item)


def same(item: Generate, answers: Answers, *, others: Answers | None = None) -> None:
    expected = others or alone(item)
    number = item.request_id
    assert answers.tokens[number] == expected.tokens[number]
    assert answers.finish[number] == expected.finish[number]
    ours, theirs = answers.logprobs.get(number, []), expected.logprobs.get(number, [])
    assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
    assert [entry.logprob for entry in answers.prompt_logprobs.get(number, [])] == pytest.approx(
        [entry.logprob for entry in expected.prompt_logprobs.get(number, [])], abs=1e-4
    )


KINDS = (
    GREEDY,
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=4),
    SamplingParams(temperature=0.7, seed=5, frequency_penalty=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, presence_penalty=1.5, logprobs=2),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.0, logit_bias={7: 3.0}),
)
