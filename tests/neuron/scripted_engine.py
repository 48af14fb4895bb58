"""Engine groups over the scripted worker, and ways to wait for what they do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuron.daemon.supervisor.engine_group import EngineGroup, GroupEvent, GroupFailed, GroupLoaded
from neuron.daemon.supervisor.process_group import LaunchSettings, WorkerCommand
from neuron.daemon.supervisor.restart_policy import RestartPolicy
from neuron.protocol import EngineConfig, Generate, SamplingParams

WORKER = Path(__file__).with_name("scripted_worker.py")


def scripted_command(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    return [sys.executable, str(WORKER), "--socket", str(socket_path), "--epoch", str(epoch), "--rank", str(rank)]


def scripted_with(*options: str) -> WorkerCommand:
    """The scripted worker with further options on its command line."""
    return lambda socket_path, epoch, rank: [*scripted_command(socket_path, epoch, rank), *options]


def mute_command(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    """A process that never connects."""
    return [sys.executable, "-c", "import signal; signal.pause()"]


class Events:
    """Collects group events; `until` waits for one."""

    def __init__(self) -> None:
        self.seen: list[GroupEvent] = []
        self._changed = asyncio.Event()

    def __call__(self, event: GroupEvent) -> None:
        self.seen.append(event)
        self._changed.set()

    async def until(self, kind: type[GroupEvent], count: int = 1) -> Any:
        async with asyncio.timeout(60):
            while True:
                found = [event for event in self.seen if isinstance(event, kind)]
                if len(found) >= count:
                    return found[count - 1]
                self._changed.clear()
                await self._changed.wait()

    async def settled(self) -> GroupEvent:
        """The first of loaded and failed."""
        async with asyncio.timeout(60):
            while True:
                for event in self.seen:
                    if isinstance(event, GroupLoaded | GroupFailed):
                        return event
                self._changed.clear()
                await self._changed.wait()


def make_group(
    runtime_dir: Path,
    events: Events,
    *,
    debug: dict[str, Any] | None = None,
    attempts: int = 5,
    ping_interval_s: float = 10.0,
    **settings: Any,
) -> EngineGroup:
    settings.setdefault("command", scripted_command)
    return EngineGroup(
        EngineConfig(model_id="test/model", path="/nowhere", debug=debug or {}),
        LaunchSettings(runtime_dir=runtime_dir, **settings),
        on_event=events,
        policy=RestartPolicy(attempts=attempts),
        ping_interval_s=ping_interval_s,
    )


def request(*prompt_ids: int, max_tokens: int = 4) -> Generate:
    return Generate(0, list(prompt_ids), SamplingParams(), max_tokens)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for state that another process brings about and that has no event here."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)
