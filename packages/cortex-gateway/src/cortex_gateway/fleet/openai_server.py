"""A server that is no neuron but speaks OpenAI chat: what it says of itself, in a neuron's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import msgspec
from cortex_core.fleet import ContextLimit, DiscoveryResponse, HealthResponse, ModelInfo, ModelSpec

from cortex_gateway.fleet.neuron import NeuronClient, NeuronError

SERVICE_UNAVAILABLE = 503
MODALITIES = ("text", "vision")


class _Listed(msgspec.Struct):
    """A model of `/v1/models`: the official fields, and those of local servers that say more."""

    id: str
    created: Any = None
    loaded: Any = None
    max_model_len: Any = None
    context_length: Any = None
    max_output_tokens: Any = None
    modalities: Any = None
    tool_call: Any = None
    reasoning: Any = None


class _Listing(msgspec.Struct):
    data: list[_Listed]


class _Health(msgspec.Struct):
    draining: Any = False


class OpenAIServer(NeuronClient):
    """Any OpenAI-compatible server. What it lists is loaded there; nothing can be loaded or unloaded.

    extensions: whether it knows what local servers have added to the official API. forward_headers: those of a client's
    headers that it gets beside the usual ones, in lower case.
    """

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
        return HealthResponse(draining=answer.draining is True)

    async def models(self, timeout_s: float) -> tuple[ModelInfo, ...]:
        """Raises `NeuronError`."""
        listing = await self._get("/v1/models", _Listing, timeout_s)
        # A neuron, or another gateway, lists what it could load, too.
        return tuple(_model_info(listed) for listed in listing.data if listed.loaded is not False)

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
    context = next((size for size in (listed.max_model_len, listed.context_length) if type(size) is int), None)
    output = listed.max_output_tokens if type(listed.max_output_tokens) is int else None
    modalities = listed.modalities if isinstance(listed.modalities, list) else []
    return ModelInfo(
        id=listed.id,
        harness="openai",
        status="loaded",
        capabilities=tuple(name for name in MODALITIES if name in modalities),
        limit=ContextLimit(context=context, output=output) if context else None,
        tool_call=listed.tool_call is not False,
        reasoning=listed.reasoning is True,
        created=listed.created if type(listed.created) is int else None,
    )
