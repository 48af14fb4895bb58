"""Read the files again, check everything, and apply it whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
from cortex_core.config import ConfigError
from cortex_core.fleet_secret import places_of
from cortex_core.gateway_config import GatewayConfig

from cortex_gateway.configuration.current import Configuration, Current, read_configuration
from cortex_gateway.configuration.diff import NO_DIFFERENCE, Difference, difference, restart_needed
from cortex_gateway.configuration.watch import Prints, Settling, prints_of
from cortex_gateway.configuration.weaker import NOTHING_GONE, may_be_unfinished, weaker

logger = logging.getLogger(__name__)

Trigger = Literal["signal", "file", "admin"]
Outcome = Literal["applied", "unchanged", "refused"]

UNFINISHED_LOOKS = 7
"""Looks until a file is believed that ends in another way than before: somebody may have written or taken out something
there, or is not done with writing."""

IDLE_LOOK_S = 1.0
"""How often a reloader that is not to watch looks whether it is again."""


class Reloaded(msgspec.Struct, frozen=True):
    """changes apply now; needs_restart are settings of the files that this process does not follow."""

    outcome: Outcome
    changes: Difference
    needs_restart: tuple[str, ...]

    def __str__(self) -> str:
        if not self.needs_restart:
            return str(self.changes)
        return f"{self.changes}; a restart is needed for {' '.join(self.needs_restart)}"


class Refusal(msgspec.Struct, frozen=True):
    """Why the files do not apply: what is wrong in them (`faults`), or what they would take away without being asked to
    (`weaker`). Never both."""

    faults: tuple[str, ...] = ()
    weaker: tuple[str, ...] = ()


class Reloader:
    """One reload at a time, asked for or because a file has changed.

    refusal: why what the files hold is not what applies, where it was refused; None where it does. Who asks for a
    reload gets what the files say; a file that changes by itself never takes protection away (see `weaker`).
    """

    def __init__(
        self,
        path: Path | str,
        current: Current,
        *,
        apply: Callable[[Configuration], None],
        on_outcome: Callable[[Trigger, Outcome], None],
    ) -> None:
        # Absolute, but with its links: what they lead to is looked up at each reading.
        self._path = Path(path).absolute()
        self._current = current
        self._apply = apply
        self._on_outcome = on_outcome
        self._reading = asyncio.Lock()
        self._settling = Settling()
        self._watching: asyncio.Task[None] | None = None
        self._held: Prints | None = None  # what may be unfinished, and is waited for
        self._gone = NOTHING_GONE
        self.refusal: Refusal | None = None

    def start(self) -> None:
        """Watch the files. What was written since they were read for the start is noticed too."""
        self._watching = asyncio.create_task(self._watch(), name="watch-configuration")

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def reload(self, trigger: Trigger) -> Reloaded:
        """Raises `ConfigError` where anything is wrong; then everything is as it was."""
        async with self._reading:
            before = self._current.value
            # Taken before they are read: what is written meanwhile is noticed at the next look.
            prints = await asyncio.to_thread(self._prints, before.config)
            self._settling.take(prints)
            try:
                after = await asyncio.to_thread(read_configuration, self._path, before)
            except ConfigError as error:
                self._refuse(trigger, Refusal(faults=error.faults))
                raise
            changes = difference(before, after)
            pending = restart_needed(self._current.started_with, after)
            if trigger == "file":
                if lost := weaker(before, after, self._gone):
                    self._refuse(trigger, Refusal(weaker=tuple(lost)))
                    raise ConfigError(lost)
                if changes and not await self._is_whole(before, after, prints):
                    return Reloaded("unchanged", NO_DIFFERENCE, pending)
            self._gone = self._gone.after(before, after) if trigger == "file" else NOTHING_GONE
            if changes:
                self._apply(after)
            else:
                self._current.value = after  # it means the same, and its texts are those of the files now
            reloaded = Reloaded("applied" if changes else "unchanged", changes, pending)
            # The first look after a start finds nothing, and so may a mere touch: that is no news. That files which
            # were refused are as they were before is.
            if changes or trigger != "file" or self.refusal is not None:
                logger.info("configuration reloaded (%s): %s", trigger, reloaded)
                self._on_outcome(trigger, reloaded.outcome)
            self.refusal = None
            return reloaded

    async def _is_whole(self, before: Configuration, after: Configuration, prints: Prints) -> bool:
        """Whether to believe what a file trigger has read; if not, it is looked at again."""
        if await asyncio.to_thread(self._prints, before.config) != prints:
            self._settling.hold()  # written to while it was read
            return False
        if may_be_unfinished(before, after) and self._held != prints:
            self._held = prints
            self._settling.hold(UNFINISHED_LOOKS)
            return False
        return True

    def _refuse(self, trigger: Trigger, refusal: Refusal) -> None:
        """Said once for the same files: looking at them again is no news."""
        is_news = refusal != self.refusal or trigger != "file"
        self.refusal = refusal
        self._on_outcome(trigger, "refused")
        if not is_news:
            return
        if refusal.faults:
            logger.error("configuration refused, the running one stays (%s)\n%s", trigger, "\n".join(refusal.faults))
        else:
            logger.warning(
                "configuration refused, the running one stays: the files have changed and would protect less. If that "
                "is meant, apply it with `cortex reload` or SIGHUP\n%s",
                "\n".join(refusal.weaker),
            )

    async def try_reload(self, trigger: Trigger) -> None:
        """As `reload`, where nobody waits for the outcome but the log."""
        try:
            await self.reload(trigger)
        except ConfigError:
            pass
        except Exception:
            logger.exception("reloading the configuration failed")

    def _prints(self, config: GatewayConfig) -> Prints:
        return prints_of((str(self._path), *sorted(files_named_in(config))))

    async def _watch(self) -> None:
        while True:
            interval_s = self._current.config.gateway.config_watch_s
            await asyncio.sleep(interval_s or IDLE_LOOK_S)
            if not interval_s:
                continue
            if self._settling.is_due(await asyncio.to_thread(self._prints, self._current.config)):
                await self.try_reload("file")


def files_named_in(config: GatewayConfig) -> set[str]:
    """The catalogue, and files with secrets."""
    references = list(places_of(config.gateway.secret))
    for entry in config.neurons:
        references += [*entry.headers.values(), *places_of(entry.secret or ())]
        references += [] if entry.api_key is None else [entry.api_key]
    secrets = {reference.removeprefix("file:") for reference in references if reference.startswith("file:")}
    return {config.models_config, *secrets}
