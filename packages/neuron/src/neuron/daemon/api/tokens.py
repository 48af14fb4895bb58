"""Counting and tokenising: the renderer of prefill and the tokenizer, never the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cortex_core.dialects import anthropic_messages, openai_responses
from cortex_core.dialects.json_body import model_name

from neuron.daemon.api.exchange import Exchange
from neuron.daemon.api.services import Services
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.text_workers.messages import Count, Detokenize, Tokenize
from neuron.daemon.text_workers.served_text import ServedText


class Tokens:
    """Handlers of the counting routes, `/tokenize` and `/detokenize`. They serve while an engine recovers, too."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def count(self, exchange: Exchange) -> None:
        """Anthropic's count: what `/v1/messages` will report as its input."""
        await self._count(exchange, "messages", anthropic_messages.count_tokens_body)

    async def count_input(self, exchange: Exchange) -> None:
        """OpenAI's count: what `/v1/responses` will report as its input."""
        await self._count(exchange, "responses", openai_responses.input_tokens_body)

    async def _count(
        self, exchange: Exchange, dialect: Literal["messages", "responses"], render: Callable[[int], bytes]
    ) -> None:
        body = await exchange.read_body()
        async with exchange.watched():
            model, text = self._found(exchange, body)
            counted = await text.count(Count(dialect, model.max_model_len), body, principal=exchange.principal)
            await exchange.respond(200, render(counted))

    async def tokenize(self, exchange: Exchange) -> None:
        """`{model, prompt, add_special_tokens?}` or a chat request: `{count, max_model_len, tokens, token_strs?}`."""
        body = await exchange.read_body()
        async with exchange.watched():
            model, text = self._found(exchange, body)
            answer = await text.answer(Tokenize(model.max_model_len), body, principal=exchange.principal)
            await exchange.respond(200, answer)

    async def detokenize(self, exchange: Exchange) -> None:
        """`{model, tokens}`: `{prompt}`."""
        body = await exchange.read_body()
        async with exchange.watched():
            _, text = self._found(exchange, body)
            await exchange.respond(200, await text.answer(Detokenize(), body, principal=exchange.principal))

    def _found(self, exchange: Exchange, body: bytes) -> tuple[ServedModel, ServedText]:
        """Raises `ApiError`."""
        return self._services.manager.with_text(exchange.resolved_model or model_name(body))
