"""Hints of a request at its conversation, read only where there are several nodes to choose between.

Known clients name their session: Claude Code and opencode in headers, Codex and Zed in headers or `prompt_cache_key`,
Claude Code also inside `metadata.user_id`. Everybody else is recognised by the beginning of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from cortex_gateway.http.asgi import RawHeaders
from cortex_gateway.http.headers import AGENT_HEADER, SESSION_HEADERS

MAX_KEY = 256
PROMPT_SLACK = 4
"""Of a large body so many times the bytes are taken that are wanted of its prompt: marks are taken out of them."""

ATTRIBUTION = b"x-anthropic-billing-header"
_CACHE_MARK = re.compile(rb',?"cache_control":\{[^{}]*\}')


class _Metadata(msgspec.Struct, frozen=True):
    user_id: str | None = None


class _Keys(msgspec.Struct, frozen=True):
    prompt_cache_key: str | None = None
    metadata: _Metadata | None = None


class _Prompt(msgspec.Struct, frozen=True):
    """In the order in which templates render them: what is common to many requests comes first."""

    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


_keys = msgspec.json.Decoder(_Keys)
_prompt = msgspec.json.Decoder(_Prompt)
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT_OBJECT = rb"\{(?:[^\"{}\[\]]++|%b)*+\}" % _STRING
_FIRST_BLOCK = re.compile(rb"\[\s*+(\{(?:[^\"{}\[\]]++|%b|%b)*+\})" % (_STRING, _FLAT_OBJECT), re.DOTALL)
"""The first block of a system prompt, with its mark of where to cache."""


class RequestHints:
    """Of one request; each answer is computed once, when it is asked for."""

    __slots__ = ("_body", "_headers", "_prompt", "_session", "_session_known")

    cache_salt = ""

    def __init__(self, headers: RawHeaders, body: bytes) -> None:
        self._headers = headers
        self._body = body
        self._session: str | None = None
        self._session_known = False
        self._prompt: bytes | None = None

    @classmethod
    def known(cls, headers: RawHeaders, session: str | None, prompt: bytes) -> RequestHints:
        """Of a body that has been read elsewhere: the session that it names, and the beginning of its prompt."""
        hints = cls(headers, b"")
        hints._session = hints._session_of_headers() or session
        hints._session_known = True
        hints._prompt = prompt
        return hints

    def session(self) -> str | None:
        if not self._session_known:
            self._session = self._session_of_headers() or self._session_of_body()
            self._session_known = True
        return self._session

    def prompt(self) -> bytes:
        prompt = self._prompt
        if prompt is None:
            try:
                prompt = _stable(_prompt.decode(self._body))
            except (msgspec.DecodeError, RecursionError):
                prompt = b""
            self._prompt = prompt
        return prompt

    def _session_of_headers(self) -> str | None:
        found: dict[bytes, bytes] = {}
        for name, value in self._headers:
            if name in SESSION_HEADERS or name == AGENT_HEADER:
                found.setdefault(name, value)
        agent = found.get(AGENT_HEADER, b"")[:MAX_KEY].decode("latin-1")
        for name in SESSION_HEADERS:
            session = found.get(name, b"")[:MAX_KEY].decode("latin-1")
            if session:
                return f"{session}/{agent}"
        return None

    def _session_of_body(self) -> str | None:
        try:
            keys = _keys.decode(self._body)
        except (msgspec.DecodeError, RecursionError):
            return None
        return _session_in(keys)


def _session_in(keys: _Keys) -> str | None:
    if keys.prompt_cache_key:
        return keys.prompt_cache_key[:MAX_KEY]
    user = keys.metadata.user_id if keys.metadata is not None else None
    # A session id inside it makes it a session's; without one it is a person, who may have many.
    return user[: 2 * MAX_KEY] if user and "session" in user else None


def read_hints(fields: Mapping[str, msgspec.Raw], num_bytes: int) -> tuple[str | None, bytes]:
    """The session that a body names and the first `num_bytes` of its prompt, from its fields."""
    try:
        keys = msgspec.json.decode(encoded(fields, _Keys.__struct_fields__), type=_Keys)
        session = _session_in(keys)
    except (msgspec.DecodeError, RecursionError):
        session = None
    try:
        parts = {name: fields[name] for name in _Prompt.__struct_fields__ if name in fields}
        prompt = _stable(_Prompt(**parts), PROMPT_SLACK * num_bytes)[:num_bytes]
    except (msgspec.DecodeError, RecursionError):
        prompt = b""
    return session, prompt


def encoded(fields: Mapping[str, msgspec.Raw], names: Iterable[str]) -> bytes:
    """A body of these fields alone."""
    members = (b"%b:%b" % (msgspec.json.encode(name), bytes(fields[name])) for name in names if name in fields)
    return b"{%b}" % b",".join(members)


def _stable(prompt: _Prompt, num_bytes: int | None = None) -> bytes:
    """The prompt as bytes, without what changes from turn to turn although the text does not: the marks of where to
    cache, and the attribution block whose hash is new in every request. num_bytes: as many of them are enough."""
    system = bytes(prompt.system)
    if ATTRIBUTION in system[:512] and system.startswith(b"["):
        first = _FIRST_BLOCK.match(system)
        if first is not None and ATTRIBUTION in first[1][:256]:
            system = system[first.end() :]
    parts = (prompt.tools, system, prompt.instructions, prompt.messages, prompt.input, prompt.prompt)
    text = b"\n".join(bytes(memoryview(part)[:num_bytes]) for part in parts)[:num_bytes]
    return _CACHE_MARK.sub(b"", text) if b'"cache_control"' in text else text
