"""Constrained decoding with llguidance: compiled off the step thread, one matcher per sequence."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llguidance
import numpy as np
import numpy.typing as npt

from neuron.engine.errors import RequestError
from neuron.protocol import GRAMMAR_LIMITS

_KEPT_GRAMMARS = 4
"""Compiled, for the other choices of a request: up to 128 ask for the same at once."""


class GrammarState:
    """Where one sequence stands in its grammar. Not thread-safe: it belongs to the step thread once compiled."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_tokens: list[int], stop_tokens: list[int]) -> None:
        self._matcher = matcher
        self._eos_tokens = eos_tokens
        self._stop_tokens = stop_tokens

    @property
    def is_complete(self) -> bool:
        """True if the grammar admits no further token."""
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> bool:
        """Take a sampled token; returns `is_complete`. Raises `RequestError` if the grammar does not admit it."""
        if not self._matcher.consume_token(token):
            raise RequestError("invalid_grammar", f"token {token} does not fit: {_first_line(self._matcher)}")
        return self.is_complete

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write the bits of the admitted tokens, least significant first, into `row`, [ceil(vocab_size / 32)] int32.

        The request's own stop tokens are admitted wherever the grammar could end, and the tokenizer's end tokens are
        not unless they are among them. Raises `RequestError` if the grammar exceeds a limit of the library.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise RequestError("invalid_grammar", _first_line(self._matcher))
        if self._matcher.is_accepting():
            bits = row.view(np.uint32)
            for token in self._eos_tokens:
                bits[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
            for token in self._stop_tokens:
                bits[token >> 5] |= np.uint32(1 << (token & 31))


def _first_line(matcher: llguidance.LLMatcher) -> str:
    return str(matcher.get_error()).split("\n", 1)[0]


class GrammarCompiler:
    """Compiles grammars for one tokenizer in a small thread pool.

    tokenizer_json: the fast tokenizer's serialised form; None makes every grammar invalid. vocab_size: of the model,
    which may be padded beyond the tokenizer's. The tokenizer's tables are built on first use, in the pool.
    """

    def __init__(self, tokenizer_json: str | None, vocab_size: int, *, num_threads: int = 2) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._limits = llguidance.LLParserLimits(verbose_errors=False, **GRAMMAR_LIMITS)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    @property
    def num_mask_words(self) -> int:
        """int32 words in a mask row."""
        return -(-self._vocab_size // 32)

    def submit(
        self,
        grammar: str,
        stop_token_ids: frozenset[int],
        output_ids: list[int],
        on_done: Callable[[GrammarState | RequestError], None],
    ) -> None:
        """Compile, consume `output_ids` (of a resumed sequence), and call `on_done` from a pool thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="grammar")

        def work() -> None:
            try:
                on_done(self.compile(grammar, stop_token_ids, output_ids))
            except RequestError as exc:
                on_done(exc)
            except Exception as exc:
                # The library promises not to raise on user input; whatever comes belongs to this request alone.
                on_done(RequestError("invalid_grammar", f"{type(exc).__name__}: {exc}"))

        self._pool.submit(work)

    def compile(self, grammar: str, stop_token_ids: frozenset[int], output_ids: list[int]) -> GrammarState:
        """Raises `RequestError` (`invalid_grammar`)."""
        tokenizer = self._load_tokenizer()
        matcher = self._matcher(tokenizer, grammar)
        if output_ids and not matcher.consume_tokens(output_ids):
            raise RequestError("invalid_grammar", f"resumed output does not fit: {_first_line(matcher)}")
        stops = [token for token in stop_token_ids if token < self._vocab_size]
        eos = [token for token in tokenizer.eos_tokens if token < self._vocab_size and token not in stop_token_ids]
        return GrammarState(matcher, eos, stops)

    def _matcher(self, tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
        """A matcher at its beginning, copied from one that is kept."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.deep_copy()
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise RequestError("invalid_grammar", _first_line(matcher))
        with self._lock:
            self._kept[grammar] = matcher
            if len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return matcher.deep_copy()

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if self._tokenizer_json is None:
                    raise RequestError("invalid_grammar", "this model has no tokenizer that grammars can be built on")
                try:
                    self._tokenizer = llguidance.LLTokenizer(self._tokenizer_json)
                    # A model's vocabulary is often padded beyond the tokenizer's, and masks must cover it.
                    if self._tokenizer.vocab_size < self._vocab_size:
                        self._tokenizer = llguidance.LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size)
                except ValueError as exc:
                    raise RequestError("invalid_grammar", f"the tokenizer cannot carry grammars: {exc}") from exc
            if self._tokenizer.vocab_size > self._vocab_size:
                raise RequestError(
                    "invalid_grammar",
                    f"the tokenizer has {self._tokenizer.vocab_size} entries, the model only {self._vocab_size}",
                )
            return self._tokenizer

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
