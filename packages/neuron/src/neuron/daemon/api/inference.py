"""The one request path of all dialects: find the model, take a place, prepare, generate, answer.

A dialect differs in how its body is parsed and its events are written, and in nothing else. Of a body only `model` is
read here; all else is prepared in processes that may be killed. Whatever is known to be
wrong before the first token is an HTTP error, also for a stream; a client that hangs up ends its request wherever it
is, because everything that is held is held by a context manager.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from cortex_core.conversation import Request
from cortex_core.dialects.errors import status_of
from cortex_core.dialects.interface import Dialect
from cortex_core.dialects.json_body import model_name
from cortex_core.errors import ApiError, invalid
from cortex_core.hop import RESUME_HEADER, ResumeState, StreamHead, split_resume
from cortex_core.trace_context import read_trace_context

from neuron.daemon.admission.admission import Ticket
from neuron.daemon.api.asgi import ClientGone
from neuron.daemon.api.exchange import Exchange
from neuron.daemon.api.generation_events import GenerationEvents
from neuron.daemon.api.services import Services
from neuron.daemon.api.streamed_answer import StreamedAnswer, seeded
from neuron.daemon.observability.request_record import RequestRecord
from neuron.daemon.supervisor.engine_group import EngineGroup
from neuron.daemon.text.prompts import Choice
from neuron.daemon.text_workers.messages import DialectRoute
from neuron.daemon.text_workers.served_text import ServedText

logger = logging.getLogger(__name__)


class Inference:
    """The handler of one generating route. route names it in logs and metrics, and its dialect to the text workers."""

    def __init__(self, services: Services, dialect: Dialect, *, route: DialectRoute) -> None:
        self._services = services
        self._dialect = dialect
        self._route = route

    async def __call__(self, exchange: Exchange) -> None:
        record = RequestRecord(
            self._services.metrics,
            route=self._route,
            path=exchange.path,
            request_id=exchange.request_id,
            lines=self._services.lines,
            trace=read_trace_context(exchange.headers),
            spans=self._services.spans,
        )
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
        state, body = _resumed(exchange, body)
        record.is_resumed = state is not None
        record.principal = exchange.principal
        async with exchange.watched():
            record.asked_model = model_name(body)
            if not services.config.has_engine:
                raise no_engine()
            model = services.manager.get(exchange.resolved_model or record.asked_model)
            record.found(model.id)
            text, group = model.serving()
            exchange.fingerprint = model.fingerprint
            with model.admission.apply(record.principal, exchange.priority) as ticket:
                request, choices = await text.prepare(
                    self._route, body, max_model_len=model.max_model_len, principal=record.principal
                )
                del body
                record.prepared(request, choices)
                if model.loaded is not None and text.tokens.vocab_size > model.loaded.vocab_size:
                    _check_ids(request, choices, model.loaded.vocab_size)
                with request.own_words():
                    choices = _marked(choices, exchange, request.cache_salt)
                    events, head = self._begun(request, choices, text, record, state)
                    ticket.request(model.need(events.needs(), num_choices=request.num_choices))
                    if request.stream:
                        stream = StreamedAnswer(services.config.server, self._dialect, exchange, request, events, head)
                        if state is not None:
                            await stream.resume(state)
                        await stream.run(ticket, group, record)
                    else:
                        await self._collect(exchange, request, events, head, ticket, group, record)
                    for num_tokens in events.output_lens():
                        model.outputs.observe(num_tokens)

    def _begun(
        self,
        request: Request,
        choices: list[Choice],
        text: ServedText,
        record: RequestRecord,
        state: ResumeState | None,
    ) -> tuple[GenerationEvents, StreamHead]:
        """A new answer, or one that another neuron began. Raises `ApiError`."""
        if state is None:
            seeds = tuple(choice.sampling.seed for choice in choices)
            head = StreamHead(self._dialect.new_response_id(), int(time.time()), seeds)
        else:
            head = state.head
            choices = seeded(choices, head.seeds)
        return GenerationEvents(text, request, choices, record, answer_id=head.id), head

    async def _collect(
        self,
        exchange: Exchange,
        request: Request,
        events: GenerationEvents,
        head: StreamHead,
        ticket: Ticket,
        group: EngineGroup,
        record: RequestRecord,
    ) -> None:
        """The whole answer at once."""
        dialect = self._dialect
        collector = dialect.Collector(request, response_id=head.id, created=head.created, model=request.model)
        while not await ticket.wait(ticket.max_wait_s):
            continue
        record.seated()
        try:
            _, frames = events.frames()
            async with await group.generate(frames) as generation:
                async for batch in generation:
                    for event in events.feed(batch, generation):
                        collector.feed(event)
                    ticket.generated(events.num_generated)
        finally:
            record.usage = events.usage()
        collector.feed(record.usage)
        await exchange.respond(200, collector.body())
        record.end("ok")


def _marked(choices: list[Choice], exchange: Exchange, salt_of_client: str) -> list[Choice]:
    """Choices of the priority that a gateway gives, and that share cached prefixes only with those of equal salts: the
    gateway's for an account, the client's."""
    of_account, priority = exchange.cache_salt, exchange.priority
    if not of_account and not salt_of_client and not priority:
        return choices
    salt = f"{of_account}:{salt_of_client}" if of_account or salt_of_client else ""
    return [msgspec.structs.replace(choice, cache_salt=salt, priority=priority) for choice in choices]


def _check_ids(request: Request, choices: list[Choice], vocab_size: int) -> None:
    """Refuse tokens that the weights have no row for: of a checkpoint whose tokenizer knows more than its matrices do.

    Raises `ApiError` 400.
    """
    for choice in choices:
        largest = max((*choice.prompt.token_ids, *choice.sampling.logit_bias), default=0)
        if largest >= vocab_size:
            raise invalid(
                f"token id {largest} has no row in the model's weights, whose ids end at {vocab_size - 1}",
                param="prompt" if request.prompts else "messages",
            )


def no_engine() -> ApiError:
    return ApiError("overloaded", "This neuron is configured without an inference engine.", code="no_engine")


def _resumed(exchange: Exchange, body: bytes) -> tuple[ResumeState | None, bytes]:
    """What a gateway asks to go on from, and the client's own body. Raises `ApiError`."""
    header = exchange.header(RESUME_HEADER.encode()) if exchange.is_hop else None
    if header is None:
        return None, body
    try:
        return split_resume(header, body)
    except ValueError as exc:
        raise invalid(f"{RESUME_HEADER}: {exc}") from exc
