"""Loads at start: `default_models`, then what was served when the daemon last ended.

One after the other, in the background, once the daemon listens; visible on `/health`. A model whose loads the daemon
did not survive comes last, after a pause, and until then shows as failed with the time of its next try.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from cortex_core.errors import ApiError
from cortex_core.fleet import Activation, ActivationFailure, ModelSpec

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
"""Before each further round over those whose fetch failed for a cause that may pass (F35)."""


class Activator:
    """`run` it once; `status` says at any time how far it is.

    pause_s: how long a model has to wait (seconds), fault: why.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        load: Callable[[ModelSpec], Awaitable[None]],
        *,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        pause_s: Callable[[ModelSpec], float] = lambda spec: 0.0,
        fault: Callable[[ModelSpec], str] = lambda spec: "",
    ) -> None:
        self._load = load
        self._pause_s = pause_s
        self._fault = fault
        self._paused: dict[str, ActivationFailure] = {}
        self._retry_delays_s = retry_delays_s
        self._pending = list(specs)
        self._in_progress: str | None = None
        self._completed: list[str] = []
        self._failed: list[ActivationFailure] = []
        self._is_ready = not specs

    @property
    def status(self) -> Activation:
        return Activation(
            state="ready" if self._is_ready else "pre_warming",
            pending=tuple(spec.model_id for spec in self._pending),
            in_progress=self._in_progress,
            completed=tuple(self._completed),
            failed=(*self._failed, *self._paused.values()),
        )

    def add(self, specs: Sequence[ModelSpec]) -> None:
        """More to load; before `run`."""
        self._pending += specs
        self._is_ready = not self._pending

    async def run(self) -> None:
        """All of them; returns when there is nothing more to try."""
        clock = asyncio.get_running_loop().time
        began = clock()
        pauses = [(self._pause_s(spec), spec) for spec in self._pending]
        self._pending = [spec for pause_s, spec in pauses if not pause_s]
        later = sorted(((pause_s, spec) for pause_s, spec in pauses if pause_s), key=lambda entry: entry[0])
        for pause_s, spec in later:
            why = f"{self._fault(spec)} It is tried again after {pause_s:.0f} s; a load by hand goes at once."
            logger.error("activation: model=%s is put off: %s", spec.model_id, why)
            self._paused[spec.model_id] = ActivationFailure(spec.model_id, why, retry_at=int(time.time() + pause_s))
        await self._rounds()
        for pause_s, spec in later:
            await asyncio.sleep(max(0.0, began + pause_s - clock()))
            del self._paused[spec.model_id]
            self._pending.append(spec)
            await self._rounds()

    async def _rounds(self) -> None:
        delays = iter(self._retry_delays_s)
        self._is_ready = not self._pending
        while True:
            deferred = await self._round()
            delay_s = next(delays, None)
            if not deferred or delay_s is None:
                break
            self._pending = [spec for spec, _ in deferred]
            logger.warning("activation: %d models are tried again in %.0f s", len(deferred), delay_s)
            await asyncio.sleep(delay_s)
        self._failed += [ActivationFailure(spec.model_id, error.message) for spec, error in deferred]
        self._is_ready = True

    async def _round(self) -> list[tuple[ModelSpec, ApiError]]:
        """One attempt at each pending model; returns those worth another."""
        deferred: list[tuple[ModelSpec, ApiError]] = []
        while self._pending:
            spec = self._pending.pop(0)
            self._in_progress = spec.model_id
            try:
                await self._load(spec)
                self._completed.append(spec.model_id)
            except ApiError as exc:
                logger.error("activation: model=%s failed code=%s reason=%s", spec.model_id, exc.code, exc.message)
                if exc.code == "repo_fetch_failed" and exc.is_retryable:
                    deferred.append((spec, exc))
                else:
                    self._failed.append(ActivationFailure(spec.model_id, exc.message))
            finally:
                self._in_progress = None
        return deferred
