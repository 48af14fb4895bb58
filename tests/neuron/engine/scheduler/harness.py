"""Schedulers on small pools, and a state machine that draws their histories."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from neuron.engine.errors import RequestError
from neuron.engine.kv_cache.page_pool import PagePool
from neuron.engine.kv_cache.prefix_cache import PrefixCache
from neuron.engine.scheduler.scheduler import Scheduler
from neuron.engine.scheduler.sequence import Sequence, Status
from neuron.protocol import Generate, SamplingParams

PAGE = 4


def build(
    *, num_pages: int = 17, max_step_tokens: int = 12, max_running: int = 4, max_model_len: int = 60, cache: bool = True
) -> tuple[Scheduler, PagePool]:
    pool = PagePool(num_pages)
    return Scheduler(
        pool,
        PrefixCache(pool, PAGE, root="m:0", enabled=cache),
        page_size=PAGE,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
    ), pool


def sequence(arrival: int, tokens: list[int], **fields) -> Sequence:
    return Sequence(
        Generate(request_id=arrival, prompt_ids=tokens, sampling=SamplingParams(), max_tokens=1000, **fields), arrival
    )


def compute(scheduler: Scheduler, plan, token: int = 1) -> None:
    """What an engine does with a plan that went well."""
    for chunk in plan.chunks:
        scheduler.computed(chunk)
        if chunk.num_sampled:
            _, finish = chunk.sequence.append(token, max_model_len=scheduler.max_model_len)
            if finish is not None:
                scheduler.finish(chunk.sequence)


class Books(RuleBasedStateMachine):
    """Random arrivals, cancellations, failures and steps; pages are checked against the tokens they stand for."""

    @initialize(num_pages=st.integers(6, 24), budget=st.integers(1, 20), running=st.integers(1, 6), cache=st.booleans())
    def start(self, num_pages: int, budget: int, running: int, cache: bool) -> None:
        self.scheduler, self.pool = build(num_pages=num_pages, max_step_tokens=budget, max_running=running, cache=cache)
        self.budget = budget
        self.arrivals = 0
        # What a real cache would hold: page -> tokens at its slots together with all tokens before them.
        self.content: dict[int, dict[int, tuple[int, ...]]] = {}

    # Few distinct tokens, so that prefixes meet.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40), compiling=st.booleans(), logprobs=st.booleans())
    def arrive(self, tokens: list[int], compiling: bool, logprobs: bool) -> None:
        item = sequence(self.arrivals, tokens, prompt_logprobs=logprobs)
        self.arrivals += 1
        if compiling:
            item.status = Status.COMPILING
        try:
            self.scheduler.add(item)
        except RequestError as exc:
            assert exc.kind == "too_long"
            assert len(tokens) >= self.scheduler.max_model_len

    @precondition(lambda self: not self.scheduler.is_empty)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        self.scheduler.finish(data.draw(st.sampled_from(sorted(self.scheduler.sequences(), key=lambda s: s.arrival))))

    @rule()
    def compiled(self) -> None:
        for item in self.scheduler.sequences():
            if item.status is Status.COMPILING:
                item.status = Status.WAITING
                return

    @rule(token=st.integers(0, 1), broken=st.sampled_from([None, None, None, 0, 1]))
    def step(self, token: int, broken: int | None) -> None:
        for page in (dirty := self.pool.take_dirty()):
            self.content.pop(page, None)
        self.pool.cleaned(dirty)
        runnable = self.scheduler.has_runnable
        plan = self.scheduler.schedule()
        assert (plan is not None) == runnable, "whatever can run makes progress"
        if plan is None:
            return
        assert 0 < plan.num_tokens <= self.budget
        assert plan.num_tokens == sum(chunk.num_tokens for chunk in plan.chunks)
        assert all(chunk.num_tokens == 1 and chunk.num_sampled == 1 for chunk in plan.chunks[: plan.num_decodes])
        assert len({chunk.sequence.request_id for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            self.write(chunk)
        if broken is not None and broken < len(plan.chunks):
            victim = plan.chunks[broken].sequence
            self.scheduler.quarantine(victim)
            self.scheduler.finish(victim)
        compute(self.scheduler, plan, token)

    def write(self, chunk) -> None:
        tokens = chunk.sequence.tokens
        assert chunk.sequence.status is Status.RUNNING
        assert chunk.start == chunk.sequence.num_computed
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            page = chunk.sequence.pages[position // PAGE]
            assert page != 0
            assert self.pool.count(page) == 1, "a shared page is never written"
            self.content.setdefault(page, {})[position % PAGE] = tuple(tokens[: position + 1])
        # Everything attended to is what this very sequence would have computed.
        for position in range(chunk.start + chunk.num_tokens):
            page = chunk.sequence.pages[position // PAGE]
            assert self.content[page][position % PAGE] == tuple(tokens[: position + 1])

    @invariant()
    def books_are_consistent(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.check() == []

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for item in list(self.scheduler.sequences()):
            self.scheduler.finish(item)
        self.pool.cleaned(self.pool.take_dirty())
        assert self.scheduler.check() == []
        assert self.pool.num_free == self.pool.num_usable
        assert self.scheduler._pending == {}
