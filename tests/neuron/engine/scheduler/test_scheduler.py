"""The books of scheduler, page pool and prefix cache, driven by random events without any model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from neuron.engine.errors import RequestError
from neuron.engine.kv_cache.page_pool import OutOfPages, PagePool
from neuron.engine.kv_cache.prefix_cache import PageHashes, PrefixCache
from neuron.engine.scheduler.scheduler import Scheduler
from neuron.engine.scheduler.sequence import Sequence, Status
from neuron.protocol import ContentDigest, Generate, SamplingParams

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


Books.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_books = Books.TestCase


def test_decodes_come_first_and_prefill_fills_the_rest():
    scheduler, _ = build(num_pages=65, max_step_tokens=10)
    scheduler.add(sequence(0, [1, 2, 3]))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(20))))
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start, chunk.num_tokens, chunk.num_sampled) for chunk in plan.chunks] == [
        (0, 3, 1, 1),
        (1, 0, 9, 0),
    ]
    compute(scheduler, plan)
    compute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start, chunk.num_tokens, chunk.num_sampled) for chunk in plan.chunks] == [
        (0, 5, 1, 1),
        (1, 18, 2, 1),
    ]


def test_prefill_can_be_given_less_than_the_whole_budget():
    scheduler, _ = build(num_pages=65, max_step_tokens=20)
    scheduler.max_prefill_tokens = 6
    scheduler.add(sequence(0, list(range(20))))
    scheduler.add(sequence(1, list(range(50, 60))))
    assert [chunk.num_tokens for chunk in scheduler.schedule().chunks] == [6]


def test_a_sequence_whose_grammar_compiles_is_passed():
    scheduler, _ = build()
    first = sequence(0, [1, 2])
    first.status = Status.COMPILING
    scheduler.add(first)
    assert not scheduler.has_runnable
    assert scheduler.schedule() is None
    scheduler.add(sequence(1, [3]))
    assert [chunk.sequence.arrival for chunk in scheduler.schedule().chunks] == [1]


def test_the_queue_is_first_come_even_if_a_later_prompt_would_fit():
    scheduler, _ = build(num_pages=9, max_step_tokens=40)
    scheduler.add(sequence(0, list(range(20))))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(100, 120))))
    scheduler.add(sequence(2, [7]))
    assert [chunk.sequence.arrival for chunk in scheduler.schedule().chunks] == [0]


def test_equal_prompts_that_arrive_together_are_computed_once():
    scheduler, _ = build(num_pages=65, max_step_tokens=200, max_running=4)
    prompt = list(range(30))
    for arrival in range(4):
        scheduler.add(sequence(arrival, prompt))
    plan = scheduler.schedule()
    assert [chunk.sequence.arrival for chunk in plan.chunks] == [0]
    compute(scheduler, plan)
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start) for chunk in plan.chunks] == [(0, 30), (1, 28), (2, 28), (3, 28)]
    assert scheduler.check() == []


def test_a_waiter_does_not_hang_on_a_prefix_whose_owner_is_cancelled():
    scheduler, _ = build(num_pages=65, max_step_tokens=8)
    scheduler.add(sequence(0, list(range(40))))
    scheduler.add(sequence(1, list(range(40))))
    compute(scheduler, scheduler.schedule())
    scheduler.finish(scheduler.find(0))
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start) for chunk in plan.chunks] == [(1, 8)]


def test_least_recently_used_prefixes_are_evicted_tail_first():
    pool = PagePool(5)
    cache = PrefixCache(pool, PAGE, root="m:0")
    tokens = list(range(16))
    hashes = PageHashes()
    cache.extend_hashes(hashes, tokens, 4)
    pages = pool.allocate(4)
    for page, page_hash in zip(pages, hashes, strict=True):
        cache.register(page, page_hash)
    pool.release(pages)
    assert pool.num_free == 4 and pool.num_idle == 4
    assert pool.allocate(1) == [pages[3]]
    assert cache.match(PageHashes(), [*tokens, 99]) == pages[:3]
    with pytest.raises(OutOfPages):
        pool.allocate(4)
    assert pool.num_free == 3


def test_the_prefix_of_another_model_or_epoch_is_not_found():
    pool = PagePool(5)
    hashes = [PageHashes(), PageHashes()]
    for root, target in zip(("m:0", "m:1"), hashes, strict=True):
        PrefixCache(pool, PAGE, root=root).extend_hashes(target, list(range(8)), 2)
    assert not set(hashes[0]) & set(hashes[1])


def hashes_of(tokens: list[int], num_pages: int, salt: str = "", *contents: ContentDigest) -> PageHashes:
    hashes = PageHashes(salt, contents)
    PrefixCache(PagePool(5), PAGE, root="m:0").extend_hashes(hashes, tokens, num_pages)
    return hashes


def test_H10_prefixes_of_other_salts_are_not_found():
    tokens = list(range(4 * PAGE))
    plain, one, again, two = (hashes_of(tokens, 4, salt) for salt in ("", "a", "a", "b"))
    assert one == again
    assert len({*plain, *one, *two}) == 12


def test_what_stands_at_placeholders_tells_pages_apart():
    """An image that reaches from the second page into the third: every page from the second on depends on it."""
    tokens = [7] * (4 * PAGE)
    plain = hashes_of(tokens, 4)
    image = ContentDigest(PAGE + 1, PAGE, b"image")
    seen = hashes_of(tokens, 4, "", image)
    assert seen == hashes_of(tokens, 4, "", ContentDigest(PAGE + 1, PAGE, b"image"))
    assert [a == b for a, b in zip(plain, seen, strict=True)] == [True, False, False, False]
    others = (ContentDigest(PAGE + 1, PAGE, b"other"), ContentDigest(PAGE + 2, PAGE, b"image"))
    for other in others:
        assert [a == b for a, b in zip(seen, hashes_of(tokens, 4, "", other), strict=True)] == [True] + [False] * 3
    only_third = ContentDigest(2 * PAGE, PAGE, b"image")
    assert hashes_of(tokens, 2, "", only_third) == plain[:2]


def test_pages_released_twice_are_an_error():
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(pages)
