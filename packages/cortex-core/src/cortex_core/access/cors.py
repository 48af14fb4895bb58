"""CORS headers (Fetch): answers that a browser lets a page of another origin read. Pure.

Only for pages that may: the exact origin is named, never `*`, and no answer allows credentials: nothing here looks at a
cookie, and a key is something that a page has to have and to send itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

RawHeaders = list[tuple[bytes, bytes]]

METHODS = b"GET, HEAD, POST, OPTIONS"
MAX_AGE_S = 600
"""How long a browser goes by a preflight. What it then sends is judged anew."""

USUAL_HEADERS = (
    b"authorization, content-type, accept, x-api-key, anthropic-version, anthropic-beta, "
    b"anthropic-dangerous-direct-browser-access, openai-organization, openai-project, openai-beta, x-stainless-lang, "
    b"x-stainless-os, x-stainless-arch, x-stainless-runtime, x-stainless-runtime-version, x-stainless-package-version, "
    b"x-stainless-retry-count, x-stainless-timeout, x-stainless-helper-method"
)
"""For a preflight that names none."""

_TOKEN = re.compile(rb"[a-z0-9!#$%&'+.^_`|~-]{1,64}")
_OURS = (b"x-cortex-", b"x-helexa-", b"x-forwarded-", b"forwarded", b"proxy-")
"""Headers that say something between servers: no page has to send them."""


def answer_headers(page: bytes) -> RawHeaders:
    """On every answer to that page, errors included."""
    return [
        (b"access-control-allow-origin", page),
        (b"access-control-expose-headers", b"*"),
        (b"vary", b"origin"),
    ]


def preflight_headers(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """What a preflight (OPTIONS) is answered beside `answer_headers`. headers: of the request."""
    asked: bytes | None = None
    is_from_public_network = False
    for name, value in headers:
        if name == b"access-control-request-headers":
            asked = value
        elif name == b"access-control-request-private-network" and value == b"true":
            is_from_public_network = True
    answer: RawHeaders = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-allow-headers", USUAL_HEADERS if asked is None else _allowed(asked)),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
    ]
    if is_from_public_network:
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


def _allowed(asked: bytes) -> bytes:
    names = [name.strip().lower() for name in asked.split(b",")]
    return b", ".join(name for name in names if _TOKEN.fullmatch(name) and not name.startswith(_OURS))
