"""The secret that the gateways and neurons of a fleet share: how it travels, and how it is recognised. Pure.

There may be several at once, so that one can follow another without a moment in which some do not know it: a gateway
sends all it has, a neuron knows a gateway by any of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from cortex_core.config import ConfigError
from cortex_core.hop import CLAIMS, SECRET_HEADER
from cortex_core.secret_references import REFERENCE, absolute, resolve_secret

SecretReferences = str | tuple[str, ...]
"""One place of a secret (`env:NAME`, `file:PATH`), or several. `secret_faults` says whether they are: a pattern that is
twice in a union makes msgspec 0.22 free it twice."""

SecretMode = Literal["accept", "warn", "require"]
"""What becomes of a request without the secret: served; served and reported; refused."""

WEAK_BELOW = 16
"""Characters. A shorter secret works, and is reported at start."""
MAX_PRESENTED = 8

Standing = Literal["proven", "missing", "wrong"]

_NAME = SECRET_HEADER.encode()


def places_of(references: SecretReferences) -> tuple[str, ...]:
    return (references,) if isinstance(references, str) else references


def secret_faults(references: SecretReferences, *, where: str) -> list[str]:
    """What is wrong with a setting. Never holds what it is: it may be the secret itself."""
    return [
        f"{where}: says where the secret is, `env:NAME` or `file:PATH`, and is not the secret itself"
        for place in places_of(references)
        if not re.fullmatch(REFERENCE, place)
    ]


def absolute_places(references: SecretReferences, folder: Path) -> SecretReferences:
    """The same, with paths of files taken relative to `folder`."""
    if isinstance(references, str):
        return absolute(references, folder)
    return tuple(absolute(reference, folder) for reference in references)


def resolve_secrets(references: SecretReferences, environ: Mapping[str, str], *, where: str) -> tuple[str, ...]:
    """Raises `ConfigError`, which names the places (`where` is the key) and never the content."""
    found: list[str] = []
    faults: list[str] = []
    for reference in places_of(references):
        try:
            secret = resolve_secret(reference, environ)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        if "," in secret:
            faults.append(f"{where}: {reference.partition(':')[2]} holds a comma, which stands between two secrets")
        found.append(secret)
    if faults:
        raise ConfigError(faults)
    return tuple(found)


def header_value(secrets: Iterable[str]) -> str:
    return ", ".join(secrets)


class FleetSecrets:
    """What a neuron keeps of the secrets: their digests."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._digests = tuple(_digest(secret.encode()) for secret in secrets)

    def standing(self, headers: Iterable[tuple[bytes, bytes]]) -> Standing:
        """Takes as long for a wrong secret as for a right one: all are compared, whatever is found."""
        presented = [part.strip() for name, value in headers if name == _NAME for part in value.split(b",")]
        if not presented:
            return "missing"
        digests = [_digest(part) for part in presented[:MAX_PRESENTED]]
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        return "proven" if any(matches) else "wrong"


def without_claims(headers: Iterable[tuple[bytes, bytes]], *, is_believed: bool) -> list[tuple[bytes, bytes]]:
    """The headers as everything behind the door gets them: without the secret, and without what is not believed."""
    dropped = {_NAME} if is_believed else {_NAME, *CLAIMS}
    return [pair for pair in headers if pair[0] not in dropped]


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
