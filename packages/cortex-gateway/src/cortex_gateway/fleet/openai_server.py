"""A server that is no neuron but speaks OpenAI chat: what it says of itself, in a neuron's words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import msgspec
from cortex_core.fleet import ContextLimit, DiscoveryResponse, HealthResponse, ModelInfo, ModelSpec

from cortex_gateway.fleet.neuron import NeuronClient, NeuronError

logger = logging.getLogger(__name__)

SERVICE_UNAVAILABLE = 503
MODALITIES = ("text", "vision")


MAX_LISTING_BYTES = 4 * 2**20
MAX_LISTED = 5_000
"""Models of one server. The largest hosts list some hundreds."""
MAX_VALUE_BYTES = 1024
"""Of a field that may hold anything; a longer value says nothing."""

_ABSENT = msgspec.Raw(b"null")


class _Listed(msgspec.Struct):
    """A model of `/v1/models`: the official fields, and those of local servers that say more. What these may hold is
    anything, so it is looked at one by one."""

    id: str
    created: msgspec.Raw = _ABSENT
    loaded: msgspec.Raw = _ABSENT
    max_model_len: msgspec.Raw = _ABSENT
    context_length: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    modalities: msgspec.Raw = _ABSENT
    tool_call: msgspec.Raw = _ABSENT
    reasoning: msgspec.Raw = _ABSENT


class _Listing(msgspec.Struct):
    data: list[_Listed]


class _Health(msgspec.Struct):
    draining: msgspec.Raw = _ABSENT


def _value(raw: msgspec.Raw) -> Any:
    text = bytes(raw)
    return msgspec.json.decode(text) if len(text) <= MAX_VALUE_BYTES else None


class OpenAIServer(NeuronClient):
    """Any OpenAI-compatible server. What it lists is loaded there; nothing can be loaded or unloaded.

    extensions: whether it knows what local servers have added to the official API. forward_headers: those of a client's
    headers that it gets beside the usual ones, in lower case.
    """

    max_control_bytes = MAX_LISTING_BYTES

    def __init__(
        self,
        session: aiohttp.ClientSession,
        name: str,
        endpoint: str,
        secret_headers: Mapping[str, str],
        *,
        extensions: bool = True,
        forward_headers: Iterable[str] = (),
    ) -> None:
        # People copy the base URL that SDKs want, which ends in /v1.
        super().__init__(session, name, endpoint.rstrip("/").removesuffix("/v1"), secret_headers)
        self.extensions = extensions
        self.forward_headers = frozenset(name.lower().encode("ascii") for name in forward_headers)

    async def features(self, timeout_s: float) -> frozenset[str]:
        return frozenset()

    async def discovery(self, timeout_s: float) -> DiscoveryResponse:
        """Nothing is known of its hardware, and nothing is asked."""
        return DiscoveryResponse(hostname=self.name, harnesses=("openai",))

    async def health(self, timeout_s: float) -> HealthResponse:
        """Not every server has `/health`; one that says 503 there takes no requests, whatever it lists."""
        try:
            answer = msgspec.json.decode(await self._call("GET", "/health", None, timeout_s), type=_Health)
        except NeuronError as error:
            return HealthResponse(draining=error.status == SERVICE_UNAVAILABLE)
        except msgspec.DecodeError:
            return HealthResponse()
        return HealthResponse(draining=_value(answer.draining) is True)

    async def models(self, timeout_s: float) -> tuple[ModelInfo, ...]:
        """Raises `NeuronError`."""
        listing = await self._get("/v1/models", _Listing, timeout_s)
        if len(listing.data) > MAX_LISTED:
            logger.warning("%s lists %d models; the first %d count", self.name, len(listing.data), MAX_LISTED)
        # A neuron, or another gateway, lists what it could load, too.
        return tuple(_model_info(listed) for listed in listing.data[:MAX_LISTED] if _value(listed.loaded) is not False)

    async def load(self, spec: ModelSpec, timeout_s: float) -> None:
        raise self._unmanaged()

    async def unload(self, model: str, timeout_s: float) -> None:
        raise self._unmanaged()

    async def pin(self, model: str, pinned: bool, timeout_s: float) -> None:
        raise self._unmanaged()

    def _unmanaged(self) -> NeuronError:
        return NeuronError(f"{self.name} is no neuron: it has what it has", status=405)


def _model_info(listed: _Listed) -> ModelInfo:
    """Tools are what every chat API has, so silence is no refusal of them; of reasoning it is."""
    sizes = (_value(listed.max_model_len), _value(listed.context_length))
    context = next((size for size in sizes if type(size) is int), None)
    output, modalities, created = (_value(raw) for raw in (listed.max_output_tokens, listed.modalities, listed.created))
    output = output if type(output) is int else None
    modalities = modalities if isinstance(modalities, list) else []
    return ModelInfo(
        id=listed.id,
        harness="openai",
        status="loaded",
        capabilities=tuple(name for name in MODALITIES if name in modalities),
        limit=ContextLimit(context=context, output=output) if context else None,
        tool_call=_value(listed.tool_call) is not False,
        reasoning=_value(listed.reasoning) is True,
        created=created if type(created) is int else None,
    )
