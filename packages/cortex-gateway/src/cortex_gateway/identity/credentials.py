"""API keys as they travel and as they are kept: found in headers, made, and hashed."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from cortex_core.entitlements import HASH_PREFIX

KEY_PREFIX = "sk-cortex-"


def presented_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Every key a request carries, in both dialects' headers.

    `Authorization: Bearer` is how OpenAI clients send theirs, and Anthropic's since API version 2026-10-21;
    `x-api-key` is the older form. Some clients send both, and mean either.
    """
    found: list[bytes] = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and (key := key.strip()):
                found.append(key)
        elif name == b"x-api-key" and (key := value.strip()):
            found.append(key)
    return found


def digest_of(key: bytes) -> bytes:
    """SHA-256. Our keys are 256 random bits: there is nothing to guess that a slow hash would slow down."""
    return hashlib.sha256(key).digest()


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_text(key: str) -> str:
    """As `entitlements.keys[].hash` wants it."""
    return HASH_PREFIX + digest_of(key.encode()).hex()
