"""What a finished exchange is charged with: what the neuron said it used, else what can be known."""

from __future__ import annotations

import msgspec
from cortex_core.hop import ChoiceTokens

from cortex_gateway.identity import estimate
from cortex_gateway.relay.events import EventRelay
from cortex_gateway.relay.exchange import Exchange
from cortex_gateway.relay.translation import TranslatedStream

_decode_batches = msgspec.json.Decoder(list[list[ChoiceTokens]]).decode


def generated_tokens(events: EventRelay | TranslatedStream) -> int:
    """Tokens behind the events that were sent on: by the neuron's marks, else one for each event."""
    if not events.batches:
        return events.num_events
    batches = _decode_batches(b"[%s]" % bytes(events.batches[:-1]))
    return sum(len(choice.token_ids) for batch in batches for choice in batch)


def used(exchange: Exchange, now: float) -> estimate.Usage:
    """Nothing where no neuron worked for the client: refused, never sent, or failed before there was an answer.

    A client that hangs up pays for what was generated until then: in a stream what it was sent, else at most what
    the time allows.
    """
    grant, sent_at = exchange.grant, exchange.sent_at
    if grant is None or sent_at is None or not exchange.surface.generates:
        return estimate.NOTHING_USED
    if exchange.first_byte_at is None and exchange.outcome not in ("ok", "client_gone"):
        return estimate.NOTHING_USED
    guessed = estimate.unmetered_usage(
        grant.estimate,
        num_events=(exchange.generated or 0) if exchange.is_stream else None,
        seconds=now - sent_at,
    )
    usage = exchange.usage
    if usage is None:
        return guessed
    completion = guessed.completion if usage.completion_tokens is None else usage.completion_tokens
    if exchange.is_stream and exchange.outcome != "ok":
        # Cut short: what an event near the cut says of the usage was true at its beginning.
        completion = max(completion, guessed.completion)
    prompt = guessed.prompt if usage.prompt_tokens is None else usage.prompt_tokens
    return estimate.Usage(prompt, completion, usage.cached_tokens or 0)
