"""Translation of the engine's updates of one request into events: every choice through its own text stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
from cortex_core.conversation import Request
from cortex_core.events import Event, Finish, Usage
from cortex_core.hop import LoggedTokens, TokenLogprobs

from neuron.daemon.observability.request_record import RequestRecord
from neuron.daemon.supervisor.generation import Generation, Update
from neuron.daemon.text.prompts import Choice
from neuron.daemon.text_workers.served_text import ServedText
from neuron.protocol import Generate, Logprobs, SequenceUpdate


class GenerationEvents:
    """Fed with batches of updates; counts tokens for `Usage` on the way."""

    def __init__(
        self,
        text: ServedText,
        request: Request,
        choices: Sequence[Choice],
        record: RequestRecord,
        *,
        answer_id: str,
    ) -> None:
        self._request = request
        self._prompt_tokens = sum(choice.prompt.num_tokens for choice in choices[:: request.num_choices])
        self._choices = choices
        self._streams = [
            text.event_stream(request, choice.prompt, choice.choice, answer_id=answer_id) for choice in choices
        ]
        self._output_before: list[list[int]] = [[] for _ in choices]
        self._has_begun = [False] * len(choices)
        self._is_over = [False] * len(choices)
        self._cached: dict[int, int] = {}
        self._record = record
        self.num_generated = 0
        """Output tokens of all choices so far, as the engine counts them."""

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    def needs(self) -> list[tuple[int, int]]:
        """Length of each prompt, and the most output tokens of a choice of it."""
        firsts = self._choices[:: self._request.num_choices]
        return [(choice.prompt.num_tokens, choice.max_tokens) for choice in firsts]

    def output_lens(self) -> list[int]:
        """Tokens of every choice that has ended."""
        return [
            stream.completion_tokens for stream, is_over in zip(self._streams, self._is_over, strict=True) if is_over
        ]

    def frames(self) -> tuple[list[int], list[Generate]]:
        """The choices that the engine is to work on, and what it is to do for each.

        Asking for no output at all still means to compute the prompt (a cache warm-up, or scoring with echo): the
        engine is asked for one token, which `feed` drops.
        """
        open_choices = [index for index, is_over in enumerate(self._is_over) if not is_over]
        frames = [self._frame(index) for index in open_choices]
        frames = [msgspec.structs.replace(frame, max_tokens=1) if not frame.max_tokens else frame for frame in frames]
        return open_choices, frames

    def _frame(self, index: int) -> Generate:
        frame = self._choices[index].generate(0, tuple(self._output_before[index]))
        if frame.prompt_logprobs and self._has_begun[index]:
            frame = msgspec.structs.replace(frame, prompt_logprobs=False)  # They came with the echo.
        return frame

    def replay(self, batch: Sequence[LoggedTokens]) -> list[Event]:
        """The events of a batch that another neuron computed; to be called before `frames`.

        Raises `ValueError` for a choice that the request does not have.
        """
        updates: list[Update] = []
        for part in batch:
            if not 0 <= part.choice < len(self._choices):
                raise ValueError(f"there is no choice {part.choice}")
            self._output_before[part.choice] += part.token_ids
            logprobs = None if part.logprobs is None else [_logprobs(each) for each in part.logprobs]
            update = SequenceUpdate(0, part.token_ids, part.finish, logprobs, part.cached_tokens)
            updates.append((part.choice, update))
        events, _ = self._feed(updates, lambda index: None)
        return events

    def feed(self, batch: list[Update], generation: Generation) -> list[Event]:
        """The events of a batch; a choice that needs no more tokens is ended in the engine."""
        events, num_tokens = self._feed(batch, generation.end_choice)
        if num_tokens:
            self._record.tokens_came(num_tokens)
        return events

    def _feed(self, batch: list[Update], end_choice: Callable[[int], None]) -> tuple[list[Event], int]:
        """Events, and the tokens of the choice that got most."""
        events: list[Event] = []
        counts = [0] * len(self._choices)
        for index, update in batch:
            if self._is_over[index]:
                continue
            counts[index] += len(update.token_ids)
            self.num_generated += len(update.token_ids)
            events += self._feed_one(index, update, end_choice)
        return events, max(counts)

    def _feed_one(self, index: int, update: SequenceUpdate, end_choice: Callable[[int], None]) -> list[Event]:
        stream = self._streams[index]
        if update.cached_tokens is not None:
            self._cached.setdefault(index, update.cached_tokens)  # The neuron that began has said what counts.
        events: list[Event] = []
        if not self._has_begun[index]:
            if not (update.token_ids or update.finish or update.prompt_logprobs is not None):
                return events  # a chunk of the prompt was computed: nothing to show yet
            self._has_begun[index] = True
            events += stream.begin(update.prompt_logprobs)
        if self._choices[index].max_tokens:
            events += stream.feed(update.token_ids, update.logprobs)
        finish = update.finish
        if finish is not None and not self._choices[index].max_tokens:
            finish = "length"
        if stream.is_done:
            end_choice(index)
            events += stream.finish(finish or "stop")
        elif finish is not None:
            events += stream.finish(finish)
        else:
            return events
        self._is_over[index] = True
        self._record.finish += [event.reason for event in events if isinstance(event, Finish)]
        return events

    def usage(self) -> Usage:
        """So far. A prompt that several choices share is counted once, and so is what the cache held of it."""
        firsts = range(0, len(self._choices), self._request.num_choices)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(stream.completion_tokens for stream in self._streams),
            cached_tokens=sum(self._cached.get(index, 0) for index in firsts),
            reasoning_tokens=sum(stream.reasoning_tokens for stream in self._streams),
        )


def _logprobs(given: TokenLogprobs) -> Logprobs:
    return Logprobs(_number(given.logprob), given.top_ids, [_number(value) for value in given.top_logprobs])


def _number(value: float | None) -> float:
    return -math.inf if value is None else value
