"""Secrets out of what people are shown: headers, queries, bodies. And images down to what says that they are there.

Bodies are searched and not parsed: one that was cut in its middle is no JSON any more, and must be as clean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REMOVED = b"[removed]"

_SECRETS = (
    rb"authorization|password|passwd|secret|credentials?|private[_-]?key|api[_-]?key|access[_-]?key|subscription[_-]?key"
    rb"|(?:auth|access|refresh|bearer|authorization|id)[_-]?token"
)
_SECRET_HEADER = re.compile(rb"(?:%b|cookie|signature)|(?:^|-)token$" % _SECRETS)
_SECRET_FIELD = re.compile(rb"(?:%b|^cookie)$" % _SECRETS, re.IGNORECASE)
_SECRET_PARAMETER = re.compile(rb"(?:%b|signature|(?:^|[_-])token$|^key|^sig)$" % _SECRETS, re.IGNORECASE)
_FIELD = re.compile(rb'"([\w.-]{1,64})"[ \t\r\n]*:[ \t\r\n]*"')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_PARAMETER = re.compile(rb"([?&;]|\\u0026)([\w.-]{1,64})=([^&;#\s\"\\]*)")
_KEY_SHAPED = re.compile(rb"\bsk-[A-Za-z0-9_-]{16,}|\bBearer +[A-Za-z0-9._~+/=-]{16,}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=_-]+")

SHORTENED_FROM = 512
"""Encoded data from this length on is shortened."""
KEPT_OF_DATA = 32


def clean_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Names stay: that a key was sent is worth knowing."""
    return [(name, REMOVED if _SECRET_HEADER.search(name.lower()) else _without_keys(value)) for name, value in headers]


def clean_query(query: bytes) -> bytes:
    return _clean_parameters(b"?" + query)[1:]


def clean_body(body: bytes) -> bytes:
    """Values of fields that are known to hold secrets (in tools that servers are to call, for one), keys in the queries
    of addresses, and whatever looks like a key."""
    pieces: list[bytes] = []
    done = 0
    for field in _FIELD.finditer(body):
        if field.start() >= done and _SECRET_FIELD.search(field[1]):
            pieces += (body[done : field.end()], REMOVED)
            string = _STRING.match(body, field.end())
            done = string.end() if string is not None else field.end()
    return _clean_parameters(b"".join((*pieces, body[done:])) if pieces else body)


def _clean_parameters(text: bytes) -> bytes:
    def clean(parameter: re.Match[bytes]) -> bytes:
        return (
            b"%b%b=%b" % (parameter[1], parameter[2], REMOVED)
            if _SECRET_PARAMETER.search(parameter[2])
            else parameter[0]
        )

    return _without_keys(_PARAMETER.sub(clean, text))


def without_images(body: bytes) -> bytes:
    """Long base64 (`data:…;base64,…`, and fields called `data`) cut to its beginning. Cheap on large bodies: what is
    not base64 is only searched for those two."""
    for mark in (b";base64,", b'"data"'):
        pieces: list[bytes] = []
        done = 0
        at = body.find(mark)
        while at >= 0:
            start = at + len(mark)
            if mark == b'"data"':
                quote = body.find(b'"', start)
                start = quote + 1 if quote >= 0 and not body[start:quote].strip(b" \t\r\n:") else len(body)
            end = body.find(b'"', start)
            end = len(body) if end < 0 else end
            length = end - start
            if length >= SHORTENED_FROM and _BASE64.fullmatch(body, start, start + SHORTENED_FROM):
                pieces += (body[done : start + KEPT_OF_DATA], b"[%d characters]" % length)
                done = end
            at = body.find(mark, max(end, at + 1))
        if pieces:
            body = b"".join((*pieces, body[done:]))
    return body


def _without_keys(value: bytes) -> bytes:
    return _KEY_SHAPED.sub(REMOVED, value) if b"sk-" in value or b"Bearer" in value else value
