"""One event stream of an answer, from its first byte to its last, and from where another neuron was cut off.

Towards a gateway every write carries the comments of `cortex_core.hop`, from which another neuron could go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from cortex_core.conversation import Request
from cortex_core.dialects.interface import Dialect
from cortex_core.errors import ENDED_ENGINE, ApiError, invalid
from cortex_core.events import Usage
from cortex_core.hop import (
    MARK_END,
    USAGE_MARK,
    ChoiceTokens,
    LoggedTokens,
    ResumeState,
    StreamHead,
    TokenLogprobs,
    stream_comment,
    tokens_comment,
    unfinished_comment,
)

from neuron.daemon.admission.admission import Ticket
from neuron.daemon.api.exchange import Exchange
from neuron.daemon.api.generation_events import GenerationEvents
from neuron.daemon.common.config import ServerSection
from neuron.daemon.observability.request_record import RequestRecord
from neuron.daemon.supervisor.engine_group import EngineGroup
from neuron.daemon.text.prompts import Choice
from neuron.protocol import SequenceUpdate

_REPLAYED_AT_ONCE = 256

_USAGE = USAGE_MARK + b'{"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d,"finish":%b}' + MARK_END


class StreamedAnswer:
    """One event stream: held back until the first token or the end of the hold, then kept alive with pings."""

    def __init__(
        self,
        settings: ServerSection,
        dialect: Dialect,
        exchange: Exchange,
        request: Request,
        events: GenerationEvents,
        head: StreamHead,
    ) -> None:
        self._hold_s = settings.stream_hold_s
        self._ping_s = settings.ping_interval_s
        self._exchange = exchange
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._sent = self._began
        self._projector = dialect.Projector(request, response_id=head.id, created=head.created, model=request.model)
        self._opening = self._projector.begin(events.prompt_tokens)
        self._head = head
        self._is_marked = exchange.is_hop
        self._unmarked: list[ChoiceTokens] = []
        """Whose events have not been written yet, or are none. All of them go into one mark: a reader that gets one and
        not the next would have events of tokens that it knows nothing of."""

    async def resume(self, state: ResumeState) -> None:
        """Rebuild what the client has of the stream, and open it again behind that. Raises `ApiError`."""
        project = self._projector.feed
        try:
            for index, batch in enumerate(state.batches):
                for event in self._events.replay(batch):
                    project(event)
                if index % _REPLAYED_AT_ONCE == 0:
                    await asyncio.sleep(0)  # others are served in between
        except ValueError as exc:
            raise invalid(f"the stream cannot be continued: {exc}") from exc
        await self._exchange.start_stream()
        await self._exchange.send_chunk(stream_comment(self._head))
        self._sent = self._loop.time()

    async def run(self, ticket: Ticket, group: EngineGroup, record: RequestRecord) -> None:
        """From the queue to the last event. Errors before the first byte are raised, later ones sent as events."""
        try:
            while not await ticket.wait(self._patience()):
                await self._keep_alive()
            record.seated()
            await self._generate(ticket, group, record)
        except ApiError as exc:
            await self._fail(exc)
            raise
        except Exception:
            await self._fail(ApiError("internal", "The request failed.", code="internal_error"))
            raise
        finally:
            record.usage = self._events.usage()

    async def _generate(self, ticket: Ticket, group: EngineGroup, record: RequestRecord) -> None:
        events, project = self._events, self._projector.feed
        choices, frames = events.frames()
        if choices:
            patience_s = self._patience()
            async with await group.generate(frames, choices=choices, heartbeat_s=patience_s) as generation:
                async for batch in generation:
                    data = b"".join(map(project, events.feed(batch, generation)))
                    ticket.generated(events.num_generated)
                    if self._is_marked:
                        self._unmarked += [_tokens(index, update) for index, update in batch]
                    if data:
                        await self._send(data)
                    else:
                        await self._keep_alive()
                        generation.heartbeat_s = self._patience()
        usage = events.usage()
        hop = _usage_comment(usage, record.finish) if self._exchange.is_hop else b""
        await self._open()
        await self._exchange.end_stream(project(usage) + hop + self._projector.end())
        record.usage = usage
        record.end("ok")

    def _patience(self) -> float:
        """Seconds until something must be sent: the headers at the end of the hold, or a ping."""
        due = self._sent + self._ping_s if self._exchange.has_started else self._began + self._hold_s
        return max(0.001, due - self._loop.time())

    async def _keep_alive(self) -> None:
        if self._patience() > 0.001:
            return
        if self._exchange.has_started:
            await self._send(self._projector.ping())
        else:
            await self._open()

    async def _open(self) -> None:
        if not self._exchange.has_started:
            await self._send(b"")

    async def _send(self, data: bytes) -> None:
        """What one step brought for this stream is one write."""
        if not self._exchange.has_started:
            await self._exchange.start_stream()
            data = self._opening + data
            if self._is_marked:
                data = stream_comment(self._head) + data
        if self._is_marked:
            data += tokens_comment(self._unmarked)
            self._unmarked.clear()
        await self._exchange.send_chunk(data)
        self._sent = self._loop.time()

    async def _fail(self, error: ApiError) -> None:
        if self._exchange.has_started:
            last = self._projector.fail(error)
            if self._is_marked and error.is_retryable:
                last = unfinished_comment(error.extras.get(ENDED_ENGINE)) + last
            await self._exchange.end_stream(last)


def seeded(choices: Sequence[Choice], seeds: Sequence[int]) -> list[Choice]:
    """The choices with the seeds of a stream that goes on. Raises `ApiError`."""
    if len(seeds) != len(choices):
        raise invalid(f"the stream cannot be continued: it has {len(seeds)} choices, the request {len(choices)}")
    replace = msgspec.structs.replace
    return [
        replace(choice, sampling=replace(choice.sampling, seed=seed))
        for choice, seed in zip(choices, seeds, strict=True)
    ]


def _tokens(index: int, update: SequenceUpdate) -> ChoiceTokens:
    if update.logprobs is None:
        return ChoiceTokens(index, update.token_ids, update.finish, update.cached_tokens)
    logprobs = [TokenLogprobs(each.logprob, each.top_ids, each.top_logprobs) for each in update.logprobs]  # type: ignore[arg-type]
    return LoggedTokens(index, update.token_ids, update.finish, update.cached_tokens, logprobs)


def _usage_comment(usage: Usage, finish: list[str]) -> bytes:
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    return _USAGE % (*counts, msgspec.json.encode(finish))
