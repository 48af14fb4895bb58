"""What is done to bodies that take time: on the loop, in its turns, or by body workers."""

from __future__ import annotations

import msgspec
from cortex_core.gateway_config import PromptFiltersSection

from cortex_gateway.body_workers.messages import Facts, Read, Rename, Renamed, Translate, Translated
from cortex_gateway.body_workers.pool import BodyWorkers
from cortex_gateway.relay.envelope import with_model
from cortex_gateway.relay.exchange import Exchange
from cortex_gateway.relay.loop_turns import LoopTurns
from cortex_gateway.relay.payload import Payload
from cortex_gateway.relay.translation import Translation, read_translation, translation_of


class LargeBodies:
    """Every method may raise the `ApiError` of `BodyWorkers.run`."""

    def __init__(self, workers: BodyWorkers) -> None:
        self._workers = workers
        self._turns = LoopTurns()

    async def turn(self, payload: Payload) -> None:
        """Before something is looked for in all of a body on the loop: until the next time that something is awaited,
        no other one is."""
        if not payload.is_quick and not payload.is_large:
            await self._turns.next()

    async def read(self, payload: Payload, exchange: Exchange) -> None:
        """Of a large one, set `payload.facts`; of any other, wait for its turn."""
        if not payload.is_large:
            await self.turn(payload)
            return
        shown_bytes = 0 if exchange.capture is None else exchange.capture.max_request_bytes
        facts, _ = await self._workers.run(
            Read(payload.num_bytes, shown_bytes),
            payload.slices(),
            num_bytes=payload.num_bytes,
            principal=_principal(exchange),
        )
        assert isinstance(facts, Facts)
        payload.facts = facts

    async def renamed(self, payload: Payload, name: str, exchange: Exchange) -> Payload:
        """The body with another model in it, every other byte as it was."""
        facts = payload.facts
        if facts is None:
            return Payload([with_model(payload.whole(), name)])
        if facts.model_at is not None:
            return payload.replaced(facts.model_at, msgspec.json.encode(name))
        renamed, pieces = await self._workers.run(
            Rename(payload.num_bytes, name),
            payload.slices(),
            num_bytes=payload.num_bytes,
            principal=_principal(exchange),
        )
        assert isinstance(renamed, Renamed)
        return Payload(pieces)

    async def translated(
        self, payload: Payload, model: str, exchange: Exchange, filters: PromptFiltersSection, *, extensions: bool
    ) -> tuple[Translation, Payload]:
        """The request as a server that speaks only chat takes it, and how its answer is read."""
        assert exchange.model is not None
        if payload.is_quickly_translated:
            await self.turn(payload)
            here = exchange.translation or translation_of(exchange.surface, payload.whole(), exchange.model, filters)
            return here, Payload([here.body(model, extensions=extensions)])
        translated, pieces = await self._workers.run(
            Translate(
                payload.num_bytes,
                surface=exchange.surface.name,
                asked=exchange.model,
                model=model,
                extensions=extensions,
                drops_attribution=filters.claude_code_attribution,
            ),
            payload.slices(),
            num_bytes=payload.num_bytes,
            principal=_principal(exchange),
        )
        assert isinstance(translated, Translated)
        return read_translation(exchange.surface, translated.request, exchange.model), Payload(pieces)


def _principal(exchange: Exchange) -> str | None:
    """Whose turn it is: the account's, or of whoever asks from one address."""
    if exchange.principal is not None:
        return f"account:{exchange.principal.account_id}"
    return exchange.client
