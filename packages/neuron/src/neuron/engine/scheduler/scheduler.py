"""Scheduler: which tokens of which sequences the next step computes. Pure Python: no tensors, no clock, no I/O.

Continuous batching with one token budget per step (Sarathi-Serve, Agrawal et al. 2024): first one token for each
decoding sequence, then chunks of prompts, those that came first and the shortest (`prefill_budget`). New sequences come
from a first-come queue, in which a short one may pass long ones that have to wait for their turn in any case, and one
of higher priority a bounded number of those before it (`Sequence.place`).
A sequence is admitted when pages for all its tokens are free, and takes them at once; only decoding can run out of
pages later, and then the latest arrival gives up its pages and is computed again from its tokens.

A step may be planned while the one before is being computed (`launched`): its tokens are counted, and what they are is
not asked. Pages stay with every launched step that writes them, and nobody is preempted while one is under way.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from neuron.engine.errors import RequestError
from neuron.engine.kv_cache.page_pool import PagePool
from neuron.engine.kv_cache.prefix_cache import PageHash, PrefixCache
from neuron.engine.scheduler.prefill_budget import PrefillBudget, shares
from neuron.engine.scheduler.sequence import Sequence, Status

# So many queued sequences are looked at in a step for one that fits in.
_LOOKED_AT = 64
# A queued sequence waits for a running one that is just computing the same prefix only if that saves this much.
_PREFIX_WORTH_WAITING_FOR = 4


class StepInFlight(Exception):
    """The step that was launched must be booked before the next one can be planned."""


@dataclass(slots=True)
class Chunk:
    """Tokens start … start+num_tokens-1 of one sequence.

    num_sampled: after how many of its last tokens a token is sampled: 0 where the chunk does not reach the sequence's
    end, 1 in ordinary decoding, more where proposed tokens are verified. carry_row: the row of the launched step before
    whose sampled token is this chunk's only input, -1 where the host knows the tokens.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_sampled: int
    carry_row: int = -1


@dataclass(slots=True)
class StepPlan:
    """One step: decodes first, then prefill chunks. `step` numbers the plans, so no reply is taken for another's.

    num_decodes: of the first chunks, which have one token each. is_chained: some chunk carries a token over.
    """

    step: int
    chunks: list[Chunk]
    num_decodes: int
    num_tokens: int
    is_chained: bool = False

    def remaining(self) -> StepPlan:
        """What is left to do of this step when no other is under way: what still runs and has come so far."""
        chunks = [
            Chunk(chunk.sequence, chunk.start, chunk.num_tokens, chunk.num_sampled)
            for chunk in self.chunks
            if chunk.sequence.status is Status.RUNNING
            and chunk.start == chunk.sequence.num_computed
            and chunk.start + chunk.num_tokens <= chunk.sequence.num_tokens
        ]
        return self.only(chunks)

    def only(self, chunks: list[Chunk]) -> StepPlan:
        """The same step reduced to `chunks`, which keep their order."""
        num_decodes = 0
        for chunk in chunks:
            if chunk.num_tokens != 1:
                break
            num_decodes += 1
        return StepPlan(self.step, chunks, num_decodes, sum(chunk.num_tokens for chunk in chunks))


def _by_place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place


class Scheduler:
    """Owns the queue, the running sequences and their pages.

    `schedule` makes a plan and `computed` books one chunk of it; between the two, sequences may be finished. Where
    another plan is to be made in between, `launched` and `step_done` enclose the time when the device has the step.
    max_step_tokens: token budget of a step. max_running: sequences that hold pages at a time; at most the budget,
    because each of them is due one decode token per step. prefill_budget: the part of the budget that prefill may use,
    None for all of it; who makes it lets it learn.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache,
        *,
        page_size: int,
        max_step_tokens: int,
        max_running: int,
        max_model_len: int,
        prefill_budget: PrefillBudget | None = None,
    ) -> None:
        if max_step_tokens < 1 or max_running < 1:
            raise ValueError("max_step_tokens and max_running must be at least 1")
        self._pool = pool
        self._cache = cache
        self._page_size = page_size
        self.max_step_tokens = max_step_tokens
        self.prefill_budget = prefill_budget or PrefillBudget(max_tokens=max_step_tokens)
        self.max_running = min(max_running, max_step_tokens)
        self.max_model_len = min(max_model_len, pool.num_usable * page_size)
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        # Full prompt pages that a running sequence is about to compute, by hash, with the number of those computing.
        self._pending: dict[PageHash, int] = {}
        self._step = 0
        self._num_launched = 0
        # Sequences that are gone and whose pages a launched step may still write.
        self._retiring: list[Sequence] = []
        self.num_preemptions = 0

    # ------------------------------------------------------------------ what is here

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        return not self._by_id

    @property
    def has_runnable(self) -> bool:
        """True if the next `schedule` can yield work: something runs, or waits for nothing but its turn."""
        return bool(self._running) or any(sequence.status is Status.WAITING for sequence in self._waiting)

    def find(self, request_id: int) -> Sequence | None:
        return self._by_id.get(request_id)

    def sequences(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    # ------------------------------------------------------------------ in and out

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at its place.

        Raises `RequestError`: `too_long` if it can never fit, `internal` for an id that is in use.
        """
        if sequence.request_id in self._by_id:
            raise RequestError("internal", f"request id {sequence.request_id} is already in use")
        if sequence.num_tokens >= self.max_model_len:
            raise RequestError(
                "too_long",
                f"{sequence.num_tokens} tokens leave no room for output: the model is served with "
                f"{self.max_model_len} positions and a KV cache of {self._pool.num_usable * self._page_size} tokens",
            )
        self._by_id[sequence.request_id] = sequence
        insort(self._waiting, sequence, key=_by_place)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and let go of its pages. One that is out already is ignored."""
        if self._by_id.get(sequence.request_id) is not sequence:
            return
        del self._by_id[sequence.request_id]
        if sequence.status is Status.RUNNING:
            self._let_go(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def defer(self, sequence: Sequence) -> None:
        """Take its pages from a running sequence and let others pass it, until its status is WAITING again.

        It must not be in a step that is under way."""
        self._preempt(sequence)
        sequence.status = Status.DEFERRED

    def quarantine(self, sequence: Sequence) -> None:
        """Nothing this sequence computed may be used again: no prefix is found in the pages it still has, and they
        are zeroed before another sequence gets them."""
        self._cache.forget(sequence.pages)
        self._pool.taint(sequence.pages)

    # ------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. Preempts where it must; never exceeds the budget.

        Raises `StepInFlight` where somebody would have to be preempted while a step is under way.
        """
        preemptions_before = self.num_preemptions
        is_chained = self._num_launched > 0
        if is_chained:
            chunks = self._chained_decodes()
        else:
            # A sequence that an earlier one has just preempted is no longer running. Whether there is room is asked
            # here first: a call for each row and step would cost more than all else in this loop.
            running, page_size = Status.RUNNING, self._page_size
            chunks = [
                Chunk(sequence, sequence.num_computed, 1, 1)
                for sequence in tuple(self._running)
                if sequence.status is running
                and (num_tokens := len(sequence.tokens)) - sequence.num_computed == 1
                and (len(sequence.pages) * page_size >= num_tokens or self._make_room(sequence))
            ]
        num_decodes = len(chunks)

        prefills: list[Sequence] = []
        if num_decodes < len(self._running):
            prefills = [sequence for sequence in self._running if sequence.num_unscheduled > 1]
        admits = self._waiting and self.num_preemptions == preemptions_before
        if prefills or admits:
            budget = self.prefill_budget.tokens(num_decodes, len(prefills) + len(self._waiting))
            budget = min(self.max_step_tokens - num_decodes, budget)
            if admits and budget > 0:
                prefills = self._admit(budget, prefills)
            self._prefill(prefills, budget, chunks)
        if not chunks:
            return None
        self._step += 1
        num_tokens = num_decodes
        if num_decodes < len(chunks):
            num_tokens = sum(chunk.num_tokens for chunk in chunks)
        return StepPlan(self._step, chunks, num_decodes, num_tokens, is_chained)

    def launched(self, plan: StepPlan) -> None:
        """The device has this step, and the next one may be planned on top of it."""
        self._num_launched += 1
        row = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_in_flight += 1
            sequence.num_scheduled = chunk.start + chunk.num_tokens
            sequence.num_pending += chunk.num_sampled
            sequence.carry_row = row + chunk.num_sampled - 1
            row += chunk.num_sampled

    def step_done(self, plan: StepPlan) -> None:
        """The results of a launched step are here: to be called before they are booked, and `release` after that."""
        self._num_launched -= 1
        for chunk in plan.chunks:
            chunk.sequence.num_in_flight -= 1
            chunk.sequence.num_pending -= chunk.num_sampled

    def roll_back(self, plan: StepPlan) -> None:
        """A launched step is over and its results count for nothing: as if it had not been launched."""
        self.step_done(plan)
        for chunk in plan.chunks:
            chunk.sequence.num_scheduled = chunk.sequence.num_computed

    def release(self) -> bool:
        """Let go of the pages of those that left while a step had them, once none has. True if there were any."""
        done = [sequence for sequence in self._retiring if sequence.num_in_flight == 0]
        for sequence in done:
            self._retiring.remove(sequence)
            self._pool.release(sequence.pages)
            sequence.pages = array("i")  # a new list: an old one only ever grows
        return bool(done)

    def computed(self, chunk: Chunk) -> None:
        """The keys and values of a chunk are in the cache; its full pages can now be found by others."""
        sequence = chunk.sequence
        if sequence.status is not Status.RUNNING:
            return
        page_size = self._page_size
        first = chunk.start // page_size
        sequence.num_computed = chunk.start + chunk.num_tokens
        if sequence.num_scheduled < sequence.num_computed:
            sequence.num_scheduled = sequence.num_computed
        num_full = sequence.num_computed // page_size
        if num_full > first:
            hashes = sequence.page_hashes
            self._cache.extend_hashes(hashes, sequence.tokens, num_full)
            for index in range(first, num_full):
                self._cache.register(sequence.pages[index], hashes[index])
                self._forget_pending(sequence, index)

    def _chained_decodes(self) -> list[Chunk]:
        """The decodes of a step on top of the one that is under way, whose tokens are taken over on the device."""
        chunks = []
        for sequence in tuple(self._running):
            if sequence.num_unscheduled != 1 or sequence.ends_with_pending(self.max_model_len):
                continue
            self._make_room(sequence)
            carry_row = sequence.carry_row if sequence.num_pending else -1
            chunks.append(Chunk(sequence, sequence.num_scheduled, 1, 1, carry_row))
        return chunks

    def _prefill(self, prefills: list[Sequence], budget: int, chunks: list[Chunk]) -> None:
        lengths = [sequence.num_unscheduled for sequence in prefills]
        for sequence, length, num_tokens in zip(prefills, lengths, shares(budget, lengths), strict=True):
            if num_tokens > 0:
                chunks.append(Chunk(sequence, sequence.num_scheduled, num_tokens, int(num_tokens == length)))

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the page its next token needs; False if it had to give up its pages instead.

        Raises `StepInFlight` where that would take pages that a launched step writes.
        """
        if len(sequence.pages) * self._page_size >= len(sequence.tokens) + sequence.num_pending:
            return True
        while self._pool.num_free == 0:
            if self._num_launched:
                raise StepInFlight
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages.extend(self._pool.allocate(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=_by_place)
        self.num_preemptions += 1

    def _admit(self, budget: int, prefills: list[Sequence]) -> list[Sequence]:
        """Start waiting sequences in their order, until budget, seats or pages are used up; returns all prefills
        of the step in that order.

        Beside the first prompt there is one more that does not fit into the step. What does not fit is passed by what
        does, but keeps its claim on pages, so that it is not passed for want of them.
        """
        position = num_looked_at = num_claimed = 0
        first, *others = [sequence.num_unscheduled for sequence in prefills] or [0]
        for_others = budget - min(first, -(-budget // 2))
        left = for_others - sum(length for length in others if length <= for_others)
        has_long = any(length > for_others for length in others)
        while (
            (left > 0 or not has_long)
            and position < len(self._waiting)
            and len(self._running) < self.max_running
            and num_looked_at < _LOOKED_AT
        ):
            num_looked_at += 1
            sequence = self._waiting[position]
            if sequence.status is not Status.WAITING:
                position += 1
                continue
            matched = [] if sequence.wants_prompt_logprobs else self._cache.match(sequence.page_hashes, sequence.tokens)
            if self._is_being_computed(sequence, len(matched)):
                position += 1
                continue
            missing = -(-sequence.num_tokens // self._page_size) - len(matched)
            # Matched pages without a holder count as free now, but not once they are taken. Each running sequence
            # is left one page to grow into, or the newcomer would be preempted at once.
            revived = sum(1 for page in matched if self._pool.count(page) == 0)
            if missing + revived + num_claimed + len(self._running) > self._pool.num_free:
                break
            length = sequence.num_tokens - len(matched) * self._page_size
            if length > left and has_long:
                num_claimed += missing + revived
                position += 1
                continue
            self._pool.retain(matched)
            sequence.pages.extend(matched)
            sequence.pages.extend(self._pool.allocate(missing))
            del self._waiting[position]
            insort(self._running, sequence, key=_by_place)
            sequence.status = Status.RUNNING
            sequence.num_computed = sequence.num_scheduled = len(matched) * self._page_size
            if sequence.num_cached is None:
                sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
                self._cache.record(sequence.num_tokens, sequence.num_computed)
            self._remember_pending(sequence)
            if not prefills:
                left -= min(length, -(-budget // 2))
            elif length <= left:
                left -= length
            else:
                has_long = True
            insort(prefills, sequence, key=_by_place)
        return prefills

    def _let_go(self, sequence: Sequence) -> None:
        for index in range(sequence.num_computed // self._page_size, sequence.num_pending_until):
            self._forget_pending(sequence, index)
        sequence.num_pending_until = 0
        if sequence.num_in_flight:
            self._retiring.append(sequence)
        else:
            self._pool.release(sequence.pages)
            sequence.pages = array("i")  # a new list: an old one only ever grows
        self._running.remove(sequence)

    # ------------------------------------------------------------------ prefixes that are being computed

    def _remember_pending(self, sequence: Sequence) -> None:
        if not self._cache.is_enabled:
            return
        first = sequence.num_computed // self._page_size
        num_full = sequence.num_tokens // self._page_size
        self._cache.extend_hashes(sequence.page_hashes, sequence.tokens, num_full)
        for page_hash in sequence.page_hashes[first:num_full]:
            self._pending[page_hash] = self._pending.get(page_hash, 0) + 1
        sequence.num_pending_until = num_full

    def _forget_pending(self, sequence: Sequence, index: int) -> None:
        if index < sequence.num_pending_until:
            page_hash = sequence.page_hashes[index]
            count = self._pending[page_hash] - 1
            if count:
                self._pending[page_hash] = count
            else:
                del self._pending[page_hash]

    def _is_being_computed(self, sequence: Sequence, num_matched: int) -> bool:
        """True if running sequences are about to compute a good part of what this one would compute."""
        if not self._pending or sequence.wants_prompt_logprobs:
            return False
        end = min(num_matched + _PREFIX_WORTH_WAITING_FOR, (sequence.num_tokens - 1) // self._page_size)
        if end - num_matched < _PREFIX_WORTH_WAITING_FOR:
            return False
        self._cache.extend_hashes(sequence.page_hashes, sequence.tokens, end)
        return all(page_hash in self._pending for page_hash in sequence.page_hashes[num_matched:end])

    # ------------------------------------------------------------------ integrity

    def check(self) -> list[str]:
        """Contradictions in pages, prefixes and queues; empty when all is well. For tests and for idle moments."""
        problems = self._pool.check([sequence.pages for sequence in (*self._by_id.values(), *self._retiring)])
        problems += self._cache.check()
        if len(self._running) + len(self._waiting) != len(self._by_id):
            problems.append("a sequence is in no queue or in two")
        if len(self._running) > self.max_running:
            problems.append(f"{len(self._running)} sequences run, {self.max_running} may")
        for sequence in self._running:
            if sequence.status is not Status.RUNNING:
                problems.append(f"sequence {sequence.request_id} runs but is {sequence.status.name}")
            if sequence.num_scheduled > len(sequence.pages) * self._page_size:
                problems.append(f"sequence {sequence.request_id} has computed more tokens than its pages hold")
            if sequence.num_pending and not sequence.num_in_flight:
                problems.append(f"sequence {sequence.request_id} waits for tokens of no step")
        problems.extend(
            f"sequence {sequence.request_id} has left and no step has its pages"
            for sequence in self._retiring
            if not sequence.num_in_flight
        )
        problems.extend(
            f"waiting sequence {sequence.request_id} holds pages" for sequence in self._waiting if sequence.pages
        )
        if not self._running and self._pending:
            problems.append("prefixes are said to be computed, but nothing runs")
        return problems
