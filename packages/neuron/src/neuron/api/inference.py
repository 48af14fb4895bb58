"""The one request path of all dialects: parse, find the model, take a place, render, generate, answer.

A dialect differs in how its body is parsed and its events are written, and in nothing else. Whatever is known to be
wrong before the first token is an HTTP error, also for a stream; a client that hangs up ends its request wherever it
is, because everything that is held is held by a context manager.
"""

from __future__ import annotations

import asyncio
import logging
import time

from cortex_core.conversation import Request
from cortex_core.dialects.errors import status_of
from cortex_core.dialects.interface import Dialect
from cortex_core.errors import ApiError
from cortex_core.events import Usage

from neuron.api.asgi import ClientGone
from neuron.api.exchange import Exchange
from neuron.api.generation_events import GenerationEvents
from neuron.api.request_record import RequestRecord
from neuron.api.services import Services
from neuron.lifecycle.admission import Ticket
from neuron.lifecycle.served_model import ServedModel
from neuron.supervisor.engine_group import EngineGroup
from neuron.text import TextModel

logger = logging.getLogger(__name__)

LONG_BODY_BYTES = 8_192
"""From here on parsing, rendering and tokenising leave the event loop."""

_HOP_USAGE = b': cortex-usage {"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d}\n\n'


class Inference:
    """The handler of one generating route. route names it in logs and metrics."""

    def __init__(self, services: Services, dialect: Dialect, *, route: str) -> None:
        self._services = services
        self._dialect = dialect
        self._route = route

    async def __call__(self, exchange: Exchange) -> None:
        record = RequestRecord(self._services.metrics, route=self._route, request_id=exchange.request_id)
        try:
            await self._serve(exchange, record)
        except ClientGone:
            record.end("client_gone")
        except ApiError as exc:
            record.end(exc.code or exc.kind, status=status_of(exc, exchange.dialect), detail=exc.message)
            if not exchange.has_started:
                await exchange.fail(exc)
        except asyncio.CancelledError:
            record.end("cancelled")
            raise
        except Exception as exc:
            record.end("internal_error", status=500, detail=f"{type(exc).__name__}: {exc}")
            raise

    async def _serve(self, exchange: Exchange, record: RequestRecord) -> None:
        services = self._services
        body = await exchange.read_body()
        is_long = len(body) >= LONG_BODY_BYTES
        async with exchange.watched():
            request = await services.off_loop(lambda: self._dialect.parse(body), is_long=is_long)
            record.asked_model, record.stream = request.model, request.stream
            record.principal = exchange.principal
            if not services.config.has_engine:
                raise no_engine()
            model = services.manager.get(exchange.resolved_model or request.model)
            record.found(model.id)
            text, group = model.serving()
            with model.admission.apply(record.principal) as ticket:
                events = await self._prepare(request, text, model, record, is_long=is_long)
                ticket.request(model.need(events.needs(), num_choices=request.num_choices))
                if request.stream:
                    stream = StreamedAnswer(self._services, self._dialect, exchange, request, events)
                    await stream.run(ticket, group, record)
                else:
                    await self._collect(exchange, request, events, ticket, group, record)
                for num_tokens in events.output_lens():
                    model.outputs.observe(num_tokens)

    async def _prepare(
        self, request: Request, text: TextModel, model: ServedModel, record: RequestRecord, *, is_long: bool
    ) -> GenerationEvents:
        """Render and resolve: every error of the request itself shows here."""
        services, window = self._services, model.max_model_len
        prompts = await services.off_loop(lambda: text.render(request, max_model_len=window), is_long=is_long)
        record.prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        may_compile = request.response_format is not None or bool(request.tools)
        choices = await services.off_loop(
            lambda: text.resolve(request, prompts, max_model_len=window), is_long=may_compile
        )
        record.num_choices = len(choices)
        return GenerationEvents(text, request, prompts, choices, record)

    async def _collect(
        self,
        exchange: Exchange,
        request: Request,
        events: GenerationEvents,
        ticket: Ticket,
        group: EngineGroup,
        record: RequestRecord,
    ) -> None:
        """The whole answer at once."""
        dialect = self._dialect
        collector = dialect.Collector(
            request, response_id=dialect.new_response_id(), created=int(time.time()), model=request.model
        )
        while not await ticket.wait(ticket.max_wait_s):
            continue
        record.seated()
        try:
            async with await group.generate(events.frames()) as generation:
                async for batch in generation:
                    for event in events.feed(batch, generation):
                        collector.feed(event)
                    ticket.generated(events.num_generated)
        finally:
            record.usage = events.usage()
        collector.feed(record.usage)
        await exchange.respond(200, collector.body())
        record.end("ok")


class StreamedAnswer:
    """One event stream: held back until the first token or the end of the hold, then kept alive with pings."""

    def __init__(
        self, services: Services, dialect: Dialect, exchange: Exchange, request: Request, events: GenerationEvents
    ) -> None:
        self._hold_s = services.config.server.stream_hold_s
        self._ping_s = services.config.server.ping_interval_s
        self._exchange = exchange
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._sent = self._began
        self._projector = dialect.Projector(
            request, response_id=dialect.new_response_id(), created=int(time.time()), model=request.model
        )

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
        async with await group.generate(events.frames(), heartbeat_s=self._patience()) as generation:
            async for batch in generation:
                data = b"".join(map(project, events.feed(batch, generation)))
                ticket.generated(events.num_generated)
                if data:
                    await self._send(data)
                else:
                    await self._keep_alive()
                    generation.heartbeat_s = self._patience()
        usage = events.usage()
        hop = _hop_usage(usage) if self._exchange.is_hop else b""
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
            await self._exchange.start_stream()
            await self._send(self._projector.begin(self._events.prompt_tokens))

    async def _send(self, data: bytes) -> None:
        """What one step brought for this stream is one write."""
        if not self._exchange.has_started:
            await self._exchange.start_stream()
            data = self._projector.begin(self._events.prompt_tokens) + data
        await self._exchange.send_chunk(data)
        self._sent = self._loop.time()

    async def _fail(self, error: ApiError) -> None:
        if self._exchange.has_started:
            await self._exchange.end_stream(self._projector.fail(error))


def no_engine() -> ApiError:
    return ApiError("overloaded", "This neuron is configured without an inference engine.", code="no_engine")


def _hop_usage(usage: Usage) -> bytes:
    return _HOP_USAGE % (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
