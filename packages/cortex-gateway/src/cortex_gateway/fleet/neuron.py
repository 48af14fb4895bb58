"""HTTP to one neuron: its control endpoints with types, and the raw post that the relay streams from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import aiohttp
import msgspec
from cortex_core.dialects.limits import MAX_FOREIGN_ERROR_BYTES
from cortex_core.fleet import (
    BuildInfo,
    DiscoveryResponse,
    HealthResponse,
    ModelInfo,
    ModelSpec,
    PinRequest,
    UnloadRequest,
    needed_features,
)
from cortex_core.http_access import HOST_NOT_ALLOWED, ORIGIN_NOT_ALLOWED, SECRET_MISSING, SECRET_WRONG
from multidict import CIMultiDict
from yarl import URL

from cortex_gateway.fleet.snapshot import HOST, Shortage

T = TypeVar("T")

MAX_CONTROL_BYTES = 8 * 2**20
CONNECTION_KEEPALIVE_S = 4.0
"""Idle connections are given up before a server's usual five seconds, or a request would race with its close."""


GATEWAY_REFUSALS = frozenset((HOST_NOT_ALLOWED, ORIGIN_NOT_ALLOWED, SECRET_MISSING, SECRET_WRONG))
"""Codes of a neuron's errors that are about who asks."""


class NeuronError(Exception):
    """A neuron refused or could not be asked. `status` is None where there was no answer at all.

    `kind` is the machine-readable reason where the neuron gave one, `retry_after` its advice in seconds, `shortage`
    what it said of memory, `is_gone` that its host is there and nothing listens on its port.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
        shortage: Shortage | None = None,
        is_gone: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.retry_after = retry_after
        self.shortage = shortage
        self.is_gone = is_gone

    @property
    def refuses_gateway(self) -> bool:
        """Whether it was this gateway that was refused, whatever it asked for."""
        return self.kind in GATEWAY_REFUSALS

    @property
    def lacks_memory(self) -> bool:
        """Whether making room could help: what the load refusals of all neuron generations have in common."""
        text = f"{self.kind or ''} {self.message}".lower()
        return self.status is not None and ("insufficient" in text or "out of memory" in text or "no room" in text)

    @property
    def is_passing(self) -> bool:
        """Whether the same may work another time: it was not said that what was asked for is wrong."""
        return self.lacks_memory or self.status not in (400, 404, 422)


def open_session(*, connect_timeout_s: float) -> aiohttp.ClientSession:
    """The one client session of a gateway. No total deadline, no cookies, no decompression, no pool limit."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=CONNECTION_KEEPALIVE_S, ttl_dns_cache=60, happy_eyeballs_delay=None
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s or None),
        auto_decompress=False,
        skip_auto_headers=("accept-encoding", "user-agent", "accept", "content-type"),
        trust_env=False,
    )


class NeuronClient:
    """One neuron. `endpoint` is its configured base URL; what it says of its own address is not asked.

    secret_headers go out with every request, and nowhere else: no redirect is ever followed.

    num_requests are those of this gateway under way there; answered_at is when the neuron last began to answer a poll,
    on the loop's clock.
    """

    max_control_bytes = MAX_CONTROL_BYTES

    def __init__(
        self,
        session: aiohttp.ClientSession,
        name: str,
        endpoint: str,
        secret_headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.secret_headers = secret_headers
        self._session = session
        self._base = endpoint.rstrip("/")
        self._urls: dict[str, URL] = {}
        self.num_requests = 0
        self.answered_at = 0.0

    def url(self, path: str) -> URL:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self._base + path, encoded=True)
        return url

    async def post(self, path: str, body: bytes | aiohttp.Payload, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        """Send one inference request; returns as soon as the response headers are there.

        `path` is one of the few upstream paths, so the URL cache stays small. The caller releases or closes the
        response. Raises `aiohttp.ClientError` and `TimeoutError`.
        """
        return await self._session.post(self.url(path), data=body, headers=headers, allow_redirects=False)

    async def discovery(self, timeout_s: float) -> DiscoveryResponse:
        return await self._get("/discovery", DiscoveryResponse, timeout_s)

    async def features(self, timeout_s: float) -> frozenset[str]:
        """Of its build; none of one that says nothing of itself. Raises `NeuronError`."""
        try:
            return frozenset((await self._get("/version", BuildInfo, timeout_s)).features)
        except NeuronError as error:
            if error.status in (404, 405):
                return frozenset()
            raise

    async def health(self, timeout_s: float) -> HealthResponse:
        return await self._get("/health", HealthResponse, timeout_s)

    async def models(self, timeout_s: float) -> tuple[ModelInfo, ...]:
        return await self._get("/models", tuple[ModelInfo, ...], timeout_s)

    async def load(self, spec: ModelSpec, timeout_s: float) -> None:
        """Returns when the model serves; "already loaded" is success (F20). Raises `NeuronError`, also where the build
        that is there now would not read all of the order: it would load something else than was asked for."""
        await self._check_features(spec, timeout_s)
        body = msgspec.json.encode({k: v for k, v in msgspec.to_builtins(spec).items() if v is not None})
        try:
            await self._call("POST", "/models/load", body, timeout_s)
        except NeuronError as error:
            if error.status is None or "already loaded" not in error.message:
                raise

    async def _check_features(self, spec: ModelSpec, timeout_s: float) -> None:
        needed = needed_features(spec)
        if not needed:
            return
        missing = needed - await self.features(timeout_s)
        if missing:
            raise NeuronError(too_old(self.name, missing), status=422, kind=UNSUPPORTED_LOAD_FIELD)

    async def unload(self, model: str, timeout_s: float) -> None:
        """Returns when the memory is free again; a model that is not there is success. Raises `NeuronError`."""
        try:
            await self._call("POST", "/models/unload", msgspec.json.encode(UnloadRequest(model_id=model)), timeout_s)
        except NeuronError as error:
            if error.status != 404 or "in flight" in error.message:
                raise

    async def pin(self, model: str, pinned: bool, timeout_s: float) -> None:
        """Raises `NeuronError`; an older neuron has no such route and answers 404 or 405."""
        body = msgspec.json.encode(PinRequest(model_id=model, pinned=pinned))
        await self._call("POST", "/models/pin", body, timeout_s)

    def without_secrets(self, answer: bytes) -> bytes:
        """An error answer as it may be logged and passed on: some servers repeat the key that they refuse."""
        for value in self.secret_headers.values():
            for secret in filter(None, value.removeprefix("Bearer ").split(", ")):
                answer = answer.replace(secret.encode("ascii"), b"***")
        return answer

    async def _get(self, path: str, type_: type[T], timeout_s: float) -> T:
        answer = await self._call("GET", path, None, timeout_s)
        try:
            return msgspec.json.decode(answer, type=type_, strict=False)
        except msgspec.DecodeError as exc:
            raise NeuronError(f"GET {path} of {self.name}: unexpected answer: {exc}", status=200) from exc

    async def _call(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        headers = dict(self.secret_headers)
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method, self.url(path), data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                pieces, num_bytes = [], 0
                while chunk := await response.content.readany():
                    pieces.append(chunk)
                    num_bytes += len(chunk)
                    if num_bytes > self.max_control_bytes:
                        raise NeuronError(
                            f"{method} {path} of {self.name}: the answer has more than {self.max_control_bytes} bytes",
                            status=response.status,
                        )
                answer = b"".join(pieces)
        except TimeoutError as exc:
            raise NeuronError(f"{method} {path} of {self.name}: no answer within {timeout_s:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            is_gone = isinstance(exc, aiohttp.ClientConnectorError) and isinstance(exc.os_error, ConnectionRefusedError)
            raise NeuronError(f"{method} {path} of {self.name}: {describe(exc)}", is_gone=is_gone) from exc
        if response.status >= 400:
            answer = self.without_secrets(answer)
            raise refusal(response.status, answer, retry_after=response.headers.get("retry-after"))
        return answer


UNSUPPORTED_LOAD_FIELD = "unsupported_load_field"


def too_old(node: str, features: frozenset[str]) -> str:
    """Why a load is not asked of a node; features: what it lacks."""
    fields = ", ".join(sorted(f"`{name.removeprefix('load.')}`" for name in features))
    return f"The neuron of {node} is too old to read {fields} of a load: upgrade it, or load without."


def refusal(status: int, body: bytes, *, retry_after: str | None = None) -> NeuronError:
    """An error answer of a neuron of any age: `{"error": text}`, `{"error": {"kind" | "code", "message", …}}`."""
    message, kind = body[:600].decode("utf-8", "replace").strip() or f"status {status}", None
    try:
        document = msgspec.json.decode(body) if len(body) <= MAX_FOREIGN_ERROR_BYTES else None
    except (msgspec.DecodeError, RecursionError):
        document = None
    if isinstance(document, dict):
        error = document.get("error")
        code = document.get("code")
        kind = code if isinstance(code, str) else None
        if isinstance(error, str):
            message = error
        elif isinstance(error, dict):
            found = error.get("kind") or error.get("code") or error.get("type")
            kind = found if isinstance(found, str) else kind
            text = error.get("message") or error.get("cause") or error.get("detail")
            message = text if isinstance(text, str) else msgspec.json.encode(error).decode()[:600]
    seconds = int(retry_after) if retry_after is not None and retry_after.isdigit() else None
    shortage = _shortage(body, is_passing=status == 503)
    return NeuronError(message, status=status, kind=kind, retry_after=seconds, shortage=shortage)


class _DeviceShortage(msgspec.Struct):
    required_mb: int
    available_mb: int
    device: int | None = None


class _Facts(msgspec.Struct):
    required_mb: int
    free_mb: int
    devices: list[_DeviceShortage] = []


class _Shortage(msgspec.Struct):
    error: _Facts


_decode_shortage = msgspec.json.Decoder(_Shortage).decode


def _shortage(body: bytes, *, is_passing: bool) -> Shortage | None:
    """The numbers of a load that does not fit; None for every other answer, and from neurons that give none."""
    try:
        facts = _decode_shortage(body).error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    short = {HOST if each.device is None else each.device: each for each in facts.devices}
    short = {index: each for index, each in short.items() if each.required_mb > each.available_mb}
    return Shortage(
        needed_mb=facts.required_mb,
        free_mb=facts.free_mb,
        required_mb={index: each.required_mb for index, each in short.items()},
        available_mb={index: each.available_mb for index, each in short.items()},
        is_passing=is_passing,
    )


def describe(exc: BaseException) -> str:
    """An exception and what caused it, on one line (G11)."""
    parts: list[str] = []
    seen: BaseException | None = exc
    while seen is not None and len(parts) < 5:
        text = " ".join(str(seen).split())
        part = f"{type(seen).__name__}: {text}" if text else type(seen).__name__
        if not parts or text not in parts[-1] or not text:
            parts.append(part)
        seen = seen.__cause__
    return " <- ".join(parts)
