"""Work on bodies that takes time: on the loop, in its turns, or by body workers."""

from __future__ import annotations

from typing import Protocol

import msgspec
from cortex_core.gateway_config import PromptFiltersSection

from cortex_gateway.bodies.loop_turns import LoopTurns
from cortex_gateway.bodies.messages import Facts, Read, Rename, Renamed, Translate, Translated
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.surfaces.envelope import with_model
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.translation import Translation, read_translation, translation_of


class Sender(Protocol):
    """Of a request, what is asked here about its body. queue_key: whose turn it is, the account's or that of whoever
    asks from one address. shown_bytes: how much of the body is wanted for a capture."""

    @property
    def surface(self) -> Surface: ...

    @property
    def model(self) -> str | None: ...

    @property
    def translation(self) -> Translation | None: ...

    @property
    def queue_key(self) -> str | None: ...

    @property
    def shown_bytes(self) -> int: ...


class LargeBodies:
    """Every method may raise the `ApiError` of `BodyWorkers.run`."""

    def __init__(self, workers: BodyWorkers) -> None:
        self._workers = workers
        self._turns = LoopTurns()

    async def turn(self, payload: Payload) -> None:
        """Before something is looked for in all of a body on the loop: until the next time that something is awaited,
        few others are."""
        if not payload.is_quick and not payload.is_large:
            await self._turns.next(payload.num_bytes)

    async def read(self, payload: Payload, sender: Sender) -> None:
        """Of a large one, set `payload.facts`; of any other, wait for its turn."""
        if not payload.is_large:
            await self.turn(payload)
            return
        facts, _ = await self._workers.run(
            Read(payload.num_bytes, sender.shown_bytes),
            payload.slices(),
            num_bytes=payload.num_bytes,
            principal=sender.queue_key,
        )
        assert isinstance(facts, Facts)
        payload.facts = facts

    async def renamed(self, payload: Payload, name: str, sender: Sender) -> Payload:
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
            principal=sender.queue_key,
        )
        assert isinstance(renamed, Renamed)
        return Payload(pieces)

    async def translated(
        self, payload: Payload, model: str, sender: Sender, filters: PromptFiltersSection, *, extensions: bool
    ) -> tuple[Translation, Payload]:
        """The request as a server that speaks only chat takes it, and how its answer is read."""
        assert sender.model is not None
        if payload.is_quickly_translated:
            await self.turn(payload)
            here = sender.translation or translation_of(sender.surface, payload.whole(), sender.model, filters)
            return here, Payload([here.body(model, extensions=extensions)])
        translated, pieces = await self._workers.run(
            Translate(
                payload.num_bytes,
                surface=sender.surface.name,
                asked=sender.model,
                model=model,
                extensions=extensions,
                drops_attribution=filters.claude_code_attribution,
            ),
            payload.slices(),
            num_bytes=payload.num_bytes,
            principal=sender.queue_key,
        )
        assert isinstance(translated, Translated)
        return read_translation(sender.surface, translated.request, sender.model), Payload(pieces)
