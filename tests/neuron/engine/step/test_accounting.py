"""Scheduler, page pool and prefix cache together under random events: every page is accounted for after each.

`scheduler.harness.Books` plays arrivals, cancellations, steps and broken sequences, and checks what lies in the pages.
Here come the events of faults on top: a lost device (all pages and prefixes worthless), a sequence that goes on in
the next engine from its tokens, memory that shrinks the prefill, and the loss of every prefix.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from neuron.engine.scheduler.sequence import Sequence
from neuron.protocol import Generate, SamplingParams

from tests.neuron.engine.scheduler.harness import Books, build
from tests.neuron.rounds import SHAKEN


class Faults(Books):
    """Books that are also shaken by faults."""

    @precondition(lambda self: not self.scheduler.is_empty)
    @rule(num_pages=st.integers(6, 24))
    def engine_is_rebuilt(self, num_pages: int) -> None:
        """All of it goes to a new engine, perhaps with fewer pages, with prompts and outputs as they stand."""
        in_flight = sorted(self.scheduler.sequences(), key=lambda item: item.arrival)
        old = self.scheduler
        cache = old._cache.is_enabled
        self.scheduler, self.pool = build(
            num_pages=num_pages, max_step_tokens=self.budget, max_running=old.max_running, cache=cache
        )
        self.content = {}
        for item in in_flight:
            resumed = Sequence(
                Generate(
                    request_id=item.request_id,
                    prompt_ids=item.tokens[: item.num_prompt],
                    sampling=SamplingParams(),
                    max_tokens=item.max_tokens,
                    output_ids=tuple(item.tokens[item.num_prompt :]),
                    prompt_logprobs=item.wants_prompt_logprobs,
                ),
                item.arrival,
            )
            if resumed.num_tokens < self.scheduler.max_model_len:
                self.scheduler.add(resumed)
        for item in in_flight:
            old.finish(item)
        assert old.check() == []

    @precondition(lambda self: not self.scheduler.is_empty)
    @rule(data=st.data())
    def logits_are_bad(self, data: st.DataObject) -> None:
        """Between two steps, also of a sequence that waits: nothing of it is found again."""
        running = [item for item in self.scheduler.sequences() if item.pages]
        if running:
            victim = data.draw(st.sampled_from(sorted(running, key=lambda item: item.arrival)))
            pages = list(victim.pages)
            self.scheduler.quarantine(victim)
            self.scheduler.finish(victim)
            assert not any(page in self.scheduler._cache._hash_of for page in pages)

    @rule(share=st.integers(1, 20))
    def memory_is_short(self, share: int) -> None:
        self.scheduler.prefill_budget.max_tokens = min(share, self.scheduler.max_step_tokens)

    @rule()
    def prefixes_are_lost(self) -> None:
        self.scheduler._cache.clear()
        assert self.pool.num_idle == 0

    @invariant()
    def every_page_has_one_owner_or_is_free(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = {page for item in self.scheduler.sequences() for page in item.pages}
        assert len(held) + self.pool.num_free + len(self.pool._dirty) == self.pool.num_usable
        assert 0 not in held
        findable = set(self.scheduler._cache._hash_of)
        assert not findable & set(self.pool._blank) and not findable & set(self.pool._dirty)


Faults.TestCase.settings = SHAKEN
test_F19_no_page_is_unaccounted_for = Faults.TestCase
