"""One sequence on its way through the engine: its tokens, its pages, and when it ends."""

from __future__ import annotations

from array import array
from enum import Enum, auto
from typing import TYPE_CHECKING

from neuron.engine.kv_cache.prefix_cache import PageHashes
from neuron.protocol import FinishKind, Generate, Logprobs

if TYPE_CHECKING:
    from neuron.engine.scheduler.grammar import GrammarState
    from neuron.engine.scheduler.token_bias import TokenBias


PASSED_BY_PRIORITY = 64
"""A step of priority is worth so many places in the order of arrival: whoever has less of it is passed by so many later
ones at most, and never starves."""


class Status(Enum):
    """Stations of a sequence in the scheduler."""

    COMPILING = auto()  # its grammar is being compiled; others may pass it in the queue
    DEFERRED = auto()  # there was no memory for its step; others may pass it in the queue
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request in the engine.

    tokens: prompt and output ids in one list. num_computed: how many of them have their K and V in `pages`; the last
    sampled token has not, it is the next step's input. pages: int32 array of page numbers in order.
    num_cached: prompt tokens found in the prefix cache at the first admission, None before. arrival: position in the
    order of arrival. place: the same with priority taken into account; it decides admission and, reversed, preemption.

    Of steps that were launched and whose results have not been read: num_scheduled: tokens whose K and V they write at
    the latest, num_computed where there are none. num_pending: tokens they sample, which the device knows and the host
    does not. num_in_flight: how many steps; the pages belong to them too. carry_row: the row of the last one whose
    sampled token is this sequence's next input.
    """

    __slots__ = (
        "arrival",
        "bias",
        "carry_row",
        "grammar",
        "is_cached_reported",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_deferrals",
        "num_in_flight",
        "num_pending",
        "num_pending_until",
        "num_prompt",
        "num_scheduled",
        "page_hashes",
        "pages",
        "place",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "status",
        "stop_token_ids",
        "tokens",
        "wants_prompt_logprobs",
    )

    def __init__(self, request: Generate, arrival: int) -> None:
        self.request_id = request.request_id
        self.arrival = arrival
        self.place = (arrival - PASSED_BY_PRIORITY * request.priority, arrival)
        self.tokens: list[int] = [*request.prompt_ids, *request.output_ids]
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_pending = 0
        self.num_in_flight = 0
        self.carry_row = -1
        self.num_cached: int | None = None
        self.is_cached_reported = False
        self.pages: array[int] = array("i")
        self.page_hashes = PageHashes(request.cache_salt, request.contents)
        self.num_pending_until = 0  # the scheduler's: full pages announced as being computed
        self.sampling = request.sampling
        self.max_tokens = request.max_tokens
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.status = Status.WAITING
        self.num_deferrals = 0
        self.grammar: GrammarState | None = None
        self.bias: TokenBias | None = None
        self.wants_prompt_logprobs = request.prompt_logprobs
        self.prompt_logprobs: list[Logprobs] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_unscheduled(self) -> int:
        """Tokens, pending ones included, that no launched step computes."""
        return len(self.tokens) + self.num_pending - self.num_scheduled

    def ends_with_pending(self, max_model_len: int) -> bool:
        """True if the pending tokens are the last ones by number, whatever they are."""
        num_tokens = len(self.tokens) + self.num_pending
        return num_tokens - self.num_prompt >= self.max_tokens or num_tokens >= max_model_len

    def append(self, token: int, *, max_model_len: int) -> tuple[bool, FinishKind | None]:
        """Take a sampled token. Returns whether it is output (a stop token is not) and the reason to end, if any."""
        if token in self.stop_token_ids:
            return False, "stop"
        tokens = self.tokens
        tokens.append(token)
        if self.bias is not None:
            self.bias.add_output(token)
        if self.grammar is not None and self.grammar.advance(token):
            return True, "grammar"
        num_tokens = len(tokens)
        if num_tokens - self.num_prompt >= self.max_tokens or num_tokens >= max_model_len:
            return True, "length"
        return True, None
