"""The secrets of the fleet as a neuron holds them: read at start, and again when a file that holds one has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from cortex_core.config import ConfigError
from cortex_core.fleet_secret import (
    WEAK_BELOW,
    FleetSecrets,
    SecretMode,
    SecretReferences,
    Standing,
    places_of,
    resolve_secrets,
)

logger = logging.getLogger(__name__)

WHERE = "server.secret"

Prints = tuple[tuple[int, int, int] | None, ...]


class FleetSecret:
    """Looks at its files whenever it is asked, so that a secret is exchanged without a restart. What cannot be read is
    reported once, and what was known before goes on being known.

    Raises `ConfigError` where a secret is not where the configuration says.
    """

    def __init__(self, references: SecretReferences, mode: SecretMode, *, environ: Mapping[str, str]) -> None:
        self.mode = mode
        self._references = references
        self._environ = environ
        self._files = [
            Path(place.removeprefix("file:")) for place in places_of(references) if place.startswith("file:")
        ]
        self._prints = self._look()
        self._secrets = self._read()

    @property
    def is_configured(self) -> bool:
        return bool(places_of(self._references))

    def standing(self, headers: Iterable[tuple[bytes, bytes]]) -> Standing:
        """Whether a request knows one of them."""
        prints = self._look()
        if prints != self._prints:
            self._prints = prints
            try:
                self._secrets = self._read()
                logger.info("%s: read again", WHERE)
            except ConfigError as error:
                logger.error("the secrets known so far stay\n%s", error)
        return self._secrets.standing(headers)

    def _read(self) -> FleetSecrets:
        found = resolve_secrets(self._references, self._environ, where=WHERE)
        if any(len(secret) < WEAK_BELOW for secret in found):
            logger.warning("%s: shorter than %d characters, which can be guessed", WHERE, WEAK_BELOW)
        return FleetSecrets(found)

    def _look(self) -> Prints:
        return tuple(_print_of(path) for path in self._files)


def _print_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
