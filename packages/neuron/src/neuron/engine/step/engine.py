"""The engine of one loaded model: requests in, one `StepOutput` per step out. Knows nothing of sockets.

All methods are called by one thread (the device thread); only grammars are compiled elsewhere, and `on_wake` is called
from there when one is ready.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from neuron.engine.errors import EngineError, RequestError, ShortOfMemory
from neuron.engine.kv_cache.page_pool import PagePool
from neuron.engine.kv_cache.prefix_cache import PrefixCache
from neuron.engine.sampling.sampler import Sampled
from neuron.engine.scheduler.grammar import GrammarCompiler, GrammarState
from neuron.engine.scheduler.prefill_budget import PrefillBudget
from neuron.engine.scheduler.scheduler import Scheduler, StepPlan
from neuron.engine.scheduler.sequence import Sequence, Status
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.engine.step.runner import ChunkResult, ModelRunner
from neuron.engine.step.step_deadline import StepDeadline
from neuron.engine.step.step_pipeline import StepPipeline
from neuron.protocol import (
    EngineStats,
    FinishKind,
    Generate,
    Logprobs,
    SequenceFailed,
    SequenceUpdate,
    StepOutput,
)

# A sequence whose smallest step finds no memory is tried again after these pauses, in seconds, and fails after the
# last: what took the memory may be another process that is about to give it back.
_DEFER_S = (1.0, 2.0, 4.0)
# After an out-of-memory error prefill chunks are halved; after this many good steps they may be twice as long again.
_STEPS_BEFORE_LONGER_CHUNKS = 256


class Engine:
    """Scheduler, cache bookkeeping and runner of one model.

    The runner has been warmed up, or says nothing of how long steps take. keeps_decodes_even: see `PrefillBudget`.
    max_model_len, as an attribute, is what is served: capped by what the cache holds. `on_wake` tells another thread's
    waiter that `has_work` may have become true.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        keeps_decodes_even: bool = False,
        tokenizer_json: str | None = None,
        prefix_cache: bool = True,
        cache_root: str = "",
        epoch: int = 0,
    ) -> None:
        vocab_size, limits, page_size = runner.vocab_size, runner.limits, runner.kv.page_size
        step_seconds, prefill_seconds_per_token = runner.step_seconds, runner.prefill_seconds_per_token
        self._runner = runner
        self._vocab_size = vocab_size
        self._page_size = page_size
        self._epoch = epoch
        self._pool = PagePool(runner.kv.num_pages)
        self._cache = PrefixCache(self._pool, page_size, root=f"{cache_root}:{epoch}", enabled=prefix_cache)
        self._budget = PrefillBudget(
            max_tokens=limits.max_step_tokens,
            step_seconds=step_seconds,
            seconds_per_token=prefill_seconds_per_token,
            keeps_decodes_even=keeps_decodes_even,
        )
        self._scheduler = Scheduler(
            self._pool,
            self._cache,
            page_size=page_size,
            max_step_tokens=limits.max_step_tokens,
            max_running=limits.max_running,
            max_model_len=limits.max_model_len,
            prefill_budget=self._budget,
        )
        self.max_model_len = self._scheduler.max_model_len
        self._prefill_limit = limits.max_step_tokens
        self._pipeline = StepPipeline(
            runner,
            self._scheduler,
            depth=int(runner.overlaps),
            page_size=page_size,
            book=self._book_step,
            on_shortage=self._shorten_prefill,
        )
        self._deadline = StepDeadline(
            step_seconds=step_seconds,
            seconds_per_token=prefill_seconds_per_token,
            max_prefill_tokens=self._budget.most,
        )
        self._compiler = GrammarCompiler(tokenizer_json, vocab_size)
        self._compiled: deque[tuple[Sequence, GrammarState | RequestError]] = deque()
        self._deferred: list[tuple[float, Sequence]] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._good_steps = 0
        self._updates: list[SequenceUpdate] = []
        self._failures: list[SequenceFailed] = []
        self._is_stale = False
        self._prefill_tokens = 0
        self._prefill_seconds = 0.0
        self._decode_tokens = 0
        self._decode_seconds = 0.0
        self.on_wake: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------ requests

    def add(self, request: Generate) -> None:
        """Queue a request. One that cannot be served fails alone, in the next `step`."""
        sequence = Sequence(request, self._num_arrivals)
        self._num_arrivals += 1
        try:
            self._validate(request)
            if request.grammar is not None:
                sequence.status = Status.COMPILING
            self._scheduler.add(sequence)
        except RequestError as exc:
            self._failures.append(SequenceFailed(request.request_id, exc.kind, exc.message))
            return
        if sequence.num_output >= sequence.max_tokens:
            self._end(sequence, "length")
            return
        if TokenBias.is_needed(request.sampling):
            sequence.bias = TokenBias(request.sampling, request.prompt_ids, request.output_ids)
        if request.grammar is not None:
            self._compiler.submit(
                request.grammar.grammar,
                sequence.stop_token_ids,
                list(request.output_ids),
                lambda outcome: self._on_compiled(sequence, outcome),
            )

    def cancel(self, request_id: int) -> None:
        """Forget a request before the next step. Unknown ids are ignored."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._scheduler.finish(sequence)
            self._is_stale = True
        self._updates = [update for update in self._updates if update.request_id != request_id]
        self._failures = [failure for failure in self._failures if failure.request_id != request_id]

    def _validate(self, request: Generate) -> None:
        """Raises `RequestError` for what would otherwise fail on the device, where it might take others along."""
        if not request.prompt_ids:
            raise RequestError("internal", "the prompt is empty")
        ids = (*request.prompt_ids, *request.output_ids, *request.sampling.logit_bias)
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise RequestError("internal", f"a token id lies outside of 0 … {self._vocab_size - 1}")

    def _on_compiled(self, sequence: Sequence, outcome: GrammarState | RequestError) -> None:
        self._compiled.append((sequence, outcome))
        self.on_wake()

    def _take_compiled(self) -> None:
        while self._compiled:
            sequence, outcome = self._compiled.popleft()
            if sequence.status is not Status.COMPILING:
                continue
            if isinstance(outcome, RequestError):
                self._fail(sequence, outcome)
            elif outcome.is_complete:
                self._end(sequence, "grammar")
            else:
                sequence.grammar = outcome
                sequence.status = Status.WAITING

    def _take_set_back(self, now: float) -> None:
        """Let those queue again whose pause is over."""
        for due, sequence in self._deferred:
            if due <= now and sequence.status is Status.DEFERRED:
                sequence.status = Status.WAITING
        self._deferred = [entry for entry in self._deferred if entry[1].status is Status.DEFERRED]

    # ------------------------------------------------------------------ stepping

    @property
    def has_work(self) -> bool:
        """True if `step` would compute or report something now; false while all there is waits for a grammar, or for
        memory."""
        if self._scheduler.has_runnable or self._failures or self._updates or self._compiled or self._is_stale:
            return True
        if not self._pipeline.is_empty:
            return True
        return bool(self._deferred) and min(due for due, _ in self._deferred) <= time.monotonic()

    @property
    def is_idle(self) -> bool:
        """True if no sequence is here and nothing is left to report."""
        return self._scheduler.is_empty and not self.has_work

    def step(self) -> StepOutput | None:
        """Book one step and report it; None if there was nothing to compute or to report.

        With overlap the next step is launched before that. Raises `DeviceError` when the device is lost; every other
        failure ends the sequences it concerns.
        """
        self._take_compiled()
        if self._deferred:
            self._take_set_back(time.monotonic())
        pipeline = self._pipeline
        self._clean_pages()
        is_booked = self._capture_what_is_missed() or pipeline.advance()
        if is_booked:
            self._clean_pages()  # now, so that an idle engine has all its pages
        if pipeline.has_released:
            pipeline.has_released = False
            self._is_stale = True
        if not (is_booked or self._updates or self._failures or self._is_stale):
            return None
        output = StepOutput(self._epoch, self.stats(), self._updates, self._failures)
        self._updates, self._failures, self._is_stale = [], [], False
        return output

    def _capture_what_is_missed(self) -> bool:
        """Record a CUDA graph that many steps have had to do without. True if a step was booked for it."""
        graphs = self._runner.graphs
        key = None if graphs is None else graphs.next_key(is_idle=False)
        if key is None:
            return False
        is_booked = not self._pipeline.is_empty
        self._pipeline.drain()
        self._runner.capture_graph(key)
        return is_booked

    @property
    def has_idle_work(self) -> bool:
        """True if `work_while_idle` would do something."""
        graphs = self._runner.graphs
        return graphs is not None and graphs.next_key(is_idle=True) is not None

    def work_while_idle(self) -> None:
        """One piece of what makes later steps faster: records a CUDA graph. To be called while `is_idle`.

        Takes about as long as a few steps. Raises `DeviceError`.
        """
        graphs = self._runner.graphs
        key = None if graphs is None else graphs.next_key(is_idle=True)
        if key is not None:
            self._runner.capture_graph(key)

    def _clean_pages(self) -> None:
        """Zero the pages that held what must not be read again; others may have them then."""
        dirty = self._pool.take_dirty()
        if dirty:
            self._runner.zero_pages(dirty)
            self._pool.cleaned(dirty)

    def _shorten_prefill(self, plan: StepPlan) -> None:
        """A step found no memory."""
        self._good_steps = 0
        prefill = plan.num_tokens - plan.num_decodes
        if prefill:
            self._budget.max_tokens = max(self._page_size, prefill // 2)

    def _book_step(self, plan: StepPlan, results: list[ChunkResult], seconds: float) -> None:
        self._count(plan, results, seconds)
        for result in results:
            self._book(result)

    def _count(self, plan: StepPlan, results: list[ChunkResult], seconds: float) -> None:
        self._num_steps += 1
        tokens = sum([result.chunk.num_tokens for result in results])
        decodes = plan.num_decodes
        prefill = max(tokens - decodes, 0)
        self._decode_tokens += decodes
        self._prefill_tokens += prefill
        # A mixed step's time is shared out by tokens: both kinds go through the same matrix products.
        share = decodes / tokens if tokens else 0.0
        self._deadline.learn(prefill, seconds)
        self._budget.learn(prefill, decodes, seconds)
        self._deadline.max_prefill_tokens = self._budget.most
        self._decode_seconds += seconds * share
        self._prefill_seconds += seconds * (1.0 - share)
        if self._budget.max_tokens < self._prefill_limit:
            self._good_steps += 1
            if self._good_steps >= _STEPS_BEFORE_LONGER_CHUNKS:
                self._good_steps = 0
                self._budget.max_tokens = min(2 * self._budget.max_tokens, self._prefill_limit)

    def _book(self, result: ChunkResult) -> None:
        """Turn one chunk's result into an update or a failure, and move its sequence on."""
        chunk, sampled = result.chunk, result.sampled
        sequence = chunk.sequence
        error = sampled[0].error if sampled else None
        if sequence.status is not Status.RUNNING:
            # It ended, or was cancelled, while the device had this step.
            if error is not None and error.kind == "nan_logits":
                self._scheduler.quarantine(sequence)
            return
        if error is not None:
            self._book_error(sequence, error)
            return
        self._scheduler.computed(chunk)
        if result.prompt_logprobs:
            # After a preemption the prompt is computed again; what is there already is not added twice.
            known = len(sequence.prompt_logprobs) - chunk.start
            sequence.prompt_logprobs += result.prompt_logprobs[max(known, 0) :]
        cached = None
        if not sequence.is_cached_reported:
            sequence.is_cached_reported = True
            cached = sequence.num_cached
        if not sampled:
            if cached is not None:
                self._updates.append(SequenceUpdate(sequence.request_id, cached_tokens=cached))
            return
        try:
            tokens, logprobs, finish = self._append(sequence, sampled)
        except RequestError as exc:
            self._fail(sequence, exc)
            return
        prompt_logprobs = None
        if sequence.wants_prompt_logprobs:
            sequence.wants_prompt_logprobs = False
            prompt_logprobs = sequence.prompt_logprobs
        self._updates.append(SequenceUpdate(sequence.request_id, tokens, finish, logprobs, cached, prompt_logprobs))
        if finish is not None:
            self._scheduler.finish(sequence)

    def _book_error(self, sequence: Sequence, error: EngineError) -> None:
        """A sequence whose step found no memory comes again after a pause, a few times; any other error ends it."""
        if isinstance(error, ShortOfMemory) and sequence.num_deferrals < len(_DEFER_S):
            self._deferred.append((time.monotonic() + _DEFER_S[sequence.num_deferrals], sequence))
            sequence.num_deferrals += 1
            self._scheduler.defer(sequence)
            return
        if error.kind == "nan_logits":
            self._scheduler.quarantine(sequence)
        self._fail(sequence, error)

    def _append(
        self, sequence: Sequence, sampled: list[Sampled]
    ) -> tuple[list[int], list[Logprobs] | None, FinishKind | None]:
        """Give a sequence its tokens, up to the one that ends it: those that are output, their log-probabilities, and
        the reason to end, if any. Raises `RequestError` where one does not fit its grammar."""
        if len(sampled) == 1:  # nearly always
            (item,) = sampled
            is_output, finish = sequence.append(item.token, max_model_len=self.max_model_len)
            if not is_output:
                return [], None, finish
            return [item.token], None if item.logprobs is None else [item.logprobs], finish
        tokens: list[int] = []
        logprobs: list[Logprobs] | None = None
        finish = None
        max_model_len = self.max_model_len
        for item in sampled:
            is_output, finish = sequence.append(item.token, max_model_len=max_model_len)
            if is_output:
                tokens.append(item.token)
                if item.logprobs is not None:
                    logprobs = [*(logprobs or ()), item.logprobs]
            if finish is not None:
                break
        return tokens, logprobs, finish

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        self._scheduler.finish(sequence)
        health = error.health if isinstance(error, RequestError) else None
        self._failures.append(SequenceFailed(sequence.request_id, error.kind, error.message, health))

    def _end(self, sequence: Sequence, finish: FinishKind) -> None:
        self._scheduler.finish(sequence)
        self._updates.append(SequenceUpdate(sequence.request_id, finish=finish))

    # ------------------------------------------------------------------ state

    def stats(self) -> EngineStats:
        scheduler, pool, graphs = self._scheduler, self._pool, self._runner.graphs
        return EngineStats(
            step=self._num_steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_pages=pool.num_free,
            total_pages=pool.num_usable,
            cached_pages=pool.num_idle,
            preemptions=scheduler.num_preemptions,
            prefill_tokens=self._prefill_tokens,
            prefill_seconds=self._prefill_seconds,
            decode_tokens=self._decode_tokens,
            decode_seconds=self._decode_seconds,
            prefix_hit_tokens=self._cache.hit_tokens,
            prefix_query_tokens=self._cache.query_tokens,
            step_deadline_s=self._deadline.seconds,
            graph_steps=0 if graphs is None else graphs.num_replays,
            graphless_steps=0 if graphs is None else graphs.num_misses,
            late_compiles=self._runner.compiles.num_late,
        )

    def sign_of_life(self) -> StepOutput:
        """What is sent while sequences are here and nothing can be computed: a grammar compiles."""
        return StepOutput(self._epoch, self.stats())

    def check(self) -> list[str]:
        """Contradictions in the engine's books; empty when all is well."""
        return self._scheduler.check()

    def heal(self) -> list[str]:
        """To be called when idle: check the books and, if they are wrong, start them afresh. Returns what was wrong.

        Nothing is held when no sequence is here, so a contradiction costs the cached prefixes and no answer.
        """
        problems = self.check()
        if problems and self._scheduler.is_empty:
            self._cache.clear()
            self._pool.reset()
        return problems

    def close(self) -> None:
        self._compiler.close()
        self._runner.close()
