"""The thread that owns the device: loads the model, then steps until it is told to stop (law 2)."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cortex_core.serving.garbage import settle

from neuron.engine.worker.channels import Inbox, Outbox
from neuron.protocol import (
    Cancel,
    EngineConfig,
    EngineFault,
    EngineProgress,
    Generate,
    Loaded,
    LoadFailed,
    encode_frame,
)

if TYPE_CHECKING:
    from neuron.engine.step.engine import Engine
    from neuron.engine.step.follower import Follower

logger = logging.getLogger(__name__)

_PR_SET_NAME = 15
# While sequences are here and nothing can be computed, the daemon hears from us this often, or takes us for stuck.
_SIGN_OF_LIFE_S = 1.0

EXIT_OK = 0
EXIT_FAULT = 3
EXIT_LOAD_FAILED = 4


def device_thread_name(config: EngineConfig, rank: int) -> str:
    """`cuda-dev-N` with the CUDA index of this rank, `cpu-dev-N` with the rank when there is no device."""
    return f"cuda-dev-{config.devices[rank]}" if config.devices else f"cpu-dev-{rank}"


def _name_native_thread(name: str) -> None:
    """Show the name in `ps -L`, `top -H` and profilers too: Python before 3.14 keeps it to itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def load(config: EngineConfig, progress: Callable[[EngineProgress], None]) -> tuple[Engine, Loaded]:
    """Import torch and build the engine; called on the device thread, and nowhere else."""
    from neuron.engine.loading.loading import load_engine

    loaded = load_engine(config, progress=progress)
    settle()
    return loaded


def load_follower(
    config: EngineConfig, rank: int, progress: Callable[[EngineProgress], None], inbox: Inbox
) -> Follower:
    """The same for another rank than 0; whatever waits for rank 0 ends when the inbox is closed."""
    from neuron.engine.loading import loading

    return loading.load_follower(
        config, rank=rank, progress=progress, on_link=lambda link: inbox.when_closed(link.close)
    )


class DeviceThread(threading.Thread):
    """Runs one engine, or as another rank than 0 its part of one. `exit_code` is valid once the thread has ended;
    `on_end` is then called, on this thread."""

    def __init__(
        self,
        config: EngineConfig,
        inbox: Inbox,
        outbox: Outbox,
        *,
        rank: int = 0,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name=device_thread_name(config, rank), daemon=True)
        self._config = config
        self._inbox = inbox
        self._outbox = outbox
        self._rank = rank
        self._on_end = on_end
        self.exit_code = EXIT_OK

    def run(self) -> None:
        _name_native_thread(self.name)
        try:
            self.exit_code = self._serve()
        finally:
            self._on_end()

    def _serve(self) -> int:
        try:
            if self._rank:
                follower = load_follower(self._config, self._rank, self._report, self._inbox)
            else:
                engine, loaded = load(self._config, self._report)
        except Exception as exc:
            if self._inbox.is_closed:
                return EXIT_OK  # nobody waits for it any more
            logger.exception("loading %s failed", self._config.model_id)
            kind, message = _kind_of(exc)
            self._outbox.send(encode_frame(LoadFailed(self._config.epoch, kind, message)))
            return EXIT_LOAD_FAILED
        try:
            if self._rank:
                follower.run()
                return EXIT_OK
            self._outbox.send(encode_frame(loaded))
            self._step_until_closed(engine)
        except Exception as exc:
            logger.exception("the engine of %s cannot go on", self._config.model_id)
            kind, message = _kind_of(exc)
            self._outbox.send(encode_frame(EngineFault(self._config.epoch, kind, message)))
            return EXIT_FAULT
        finally:
            if self._rank:
                follower.close()
            else:
                engine.close()
        return EXIT_OK

    def _report(self, progress: EngineProgress) -> None:
        self._outbox.send(encode_frame(progress))

    def _step_until_closed(self, engine: Engine) -> None:
        engine.on_wake = self._inbox.wake
        inbox, outbox = self._inbox, self._outbox
        is_checked = True
        while not inbox.is_closed:
            if engine.is_idle and not is_checked:
                is_checked = True
                problems = engine.heal()
                if problems:
                    logger.error("the page books were wrong and have been rebuilt: %s", "; ".join(problems))
            sleep_s = None if engine.is_idle else _SIGN_OF_LIFE_S
            does_idle_work = engine.is_idle and engine.has_idle_work
            commands = inbox.take(wait=not (engine.has_work or does_idle_work), timeout_s=sleep_s)
            if does_idle_work and not commands:
                engine.work_while_idle()  # one piece, and then a look at what has come
                continue
            for command in commands:
                if isinstance(command, Generate):
                    engine.add(command)
                elif isinstance(command, Cancel):
                    engine.cancel(command.request_id)
            output = engine.step()
            if output is None and not engine.is_idle:
                output = engine.sign_of_life()
            if output is not None:
                is_checked = False
                outbox.send(encode_frame(output))


def _kind_of(error: Exception) -> tuple[str, str]:
    """The frame's (kind, message). Errors of the engine carry a kind; anything else is a bug of ours."""
    from neuron.engine.errors import EngineError, describe, is_device_fault, is_out_of_memory

    if isinstance(error, EngineError):
        return error.kind, error.message
    if is_out_of_memory(error):
        return "out_of_memory", describe(error)
    return ("device" if is_device_fault(error) else "internal"), describe(error)
