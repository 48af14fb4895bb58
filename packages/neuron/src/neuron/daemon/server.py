"""The daemon: bind, serve, load the default models in the background, drain and leave.

hypercorn is behind `_serve_http` alone. It cannot drain by itself what never ends, so the order at the end is ours:
close admission, let streams end within the grace time, end the rest with an error event, and only then stop the
server and every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from cortex_core.config import ConfigError
from cortex_core.errors import ApiError
from cortex_core.fleet import DiscoveryResponse, ModelSpec
from cortex_core.serving import garbage
from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.descriptors import connection_limit, descriptor_limit, raise_descriptor_limit
from cortex_core.serving.heartbeat import Heartbeat
from cortex_core.serving.http_connections import serve_http
from cortex_core.serving.listener import prepare
from cortex_core.telemetry import open_span_export
from hypercorn.config import Config

from neuron.build_info import read_build_info
from neuron.daemon.api.access import Access, exposures
from neuron.daemon.api.app import NeuronApp
from neuron.daemon.api.services import Services
from neuron.daemon.common.config import HARNESS, NeuronConfig, ServerSection, without_effect
from neuron.daemon.common.daemon_thread import run_in_daemon_thread
from neuron.daemon.hardware.host import memory_free_mb
from neuron.daemon.hardware.monitor import HardwareMonitor
from neuron.daemon.hub.sources import Sources
from neuron.daemon.lifecycle.manager import ModelManager
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.lifecycle.startup_loads import Activator
from neuron.daemon.lifecycle.state_file import ServedModels
from neuron.daemon.memory.memory_ledger import MemoryLedger
from neuron.daemon.memory.weight_cache import WeightCache, default_budget_bytes
from neuron.daemon.observability.metrics import Metrics
from neuron.daemon.supervisor.process_group import WorkerCommand, worker_command
from neuron.daemon.text_workers.worker_handle import LOST_REASONS, LostReason

logger = logging.getLogger(__name__)

EXIT_CONFIG = 2
UNLOAD_TIMEOUT_S = 20.0
SERVER_GRACE_S = 5.0
KEEP_ALIVE_S = 75.0
"""How long a connection may be without a request."""
HEAD_S = 30.0
"""How long the headers of a request may take, from their first byte."""
OWN_DESCRIPTORS = 512
"""For what is not a client's connection: engines, checkpoints, downloads, stores, refused connections."""
_BACKLOG = 4096
"""What the kernel keeps before it is accepted, if `net.core.somaxconn` allows it. Beyond that, who connects tries again
after a second."""
NOBODY = Heartbeat("", 0.0)
"""Is told nothing: daemons in somebody else's process."""


class Daemon:
    """One neuron. `bind`, then `serve` until `request_stop`.

    Raises `ConfigError` where what telemetry needs is not installed.
    """

    def __init__(
        self,
        config: NeuronConfig,
        *,
        command: WorkerCommand = worker_command,
        heartbeat: Heartbeat = NOBODY,
    ) -> None:
        self._config = config
        self._heartbeat = heartbeat
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        build = read_build_info()
        self._span_export = open_span_export(
            config.telemetry,
            service="neuron",
            version=build.package_version,
            package="helexa-neuron",
            environ=os.environ,
        )
        access = Access(
            config,
            on_refusal=lambda reason: self.services.metrics.access_refused.labels(reason).inc(),
            on_warning=lambda reason: self.services.metrics.access_unproven.labels(reason).inc(),
        )
        self._runtime_dir, self._runtime_lock = _make_runtime_dir()
        hardware = HardwareMonitor(harnesses=(HARNESS,) if config.has_engine else ())
        discovery = hardware.discovery
        sources = Sources(config.tables)
        specs = config.default_models if config.has_engine else ()
        self._served = ServedModels(
            state_path(config) if config.has_engine else None,
            id_of=sources.public_id,
            configured=_ids_of(specs, sources),
        )
        floor_bytes = config.tables.context_limit.min_free_floor_mb * 2**20
        weights = _make_weight_cache(config, discovery, floor_bytes=floor_bytes)
        manager = ModelManager(
            config,
            sources,
            runtime_dir=self._runtime_dir,
            hardware=hardware,
            memory=MemoryLedger(
                hardware.measure,
                host_total_bytes=discovery.memory_total_mb * 2**20,
                floor_bytes=floor_bytes,
                reclaimable=lambda: weights.held_bytes,
            ),
            weights=weights,
            command=command,
            served=self._served,
        )
        manager.on_loaded, manager.on_text_end = self._on_loaded, self._on_text_end
        self._connections = _connection_table(config.server)
        metrics = Metrics(
            build=build,
            models=manager.all,
            reading=lambda: hardware.reading,
            weights=weights,
            connections=self._connections,
        )
        self.services = Services(
            config=config,
            manager=manager,
            hardware=hardware,
            activator=Activator(
                specs,
                lambda spec: self._served.load(spec, manager.load),
                pause_s=self._served.pause_s,
                fault=self._served.fault,
            ),
            metrics=metrics,
            build=build,
            access=access,
        )
        if self._span_export is not None:
            from neuron.daemon.observability.spans import RequestSpans

            self.services.spans = RequestSpans(self._span_export.tracer)
        self._listener: socket.socket | None = None

    def bind(self) -> str:
        """Listen; connections queue from here on. Returns the URL. Raises `OSError`."""
        listener = _listen(self._config.host, self._config.port)
        self._listener = prepare(listener, write_timeout_s=self._config.server.write_timeout_s)
        self.services.port = self._listener.getsockname()[1]
        host = self._config.host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.services.port}"

    def request_stop(self) -> None:
        """Drain and leave; a second time, leave without waiting."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def serve(self) -> None:
        """Until stopped. Returns when every stream has ended, every engine is gone and the port is closed."""
        services, listener = self.services, self._listener
        assert listener is not None, "bind first"
        for key in without_effect(self._config):
            logger.warning("configuration key without effect here: %s", key)
        for exposure in exposures(self._config, str(listener.getsockname()[0])):
            logger.warning("open: %s", exposure)
        services.hardware.start()
        restored = self._served.open()
        if restored:
            logger.info("served before the last end: %s", ", ".join(spec.model_id for spec in restored))
        services.activator.add(restored)
        activation = asyncio.create_task(services.activator.run(), name="activation")
        activation.add_done_callback(_log_crash)
        relief = asyncio.create_task(services.manager.weights.watch(), name="weight-cache")
        relief.add_done_callback(_log_crash)
        http_stop = asyncio.Event()
        serving = _serve_http(
            *(NeuronApp(services), listener, self._connections, http_stop), on_open=self._heartbeat.serving
        )
        http = asyncio.create_task(serving, name="http")
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((http, stop), return_when=asyncio.FIRST_COMPLETED)
            if http.done():
                http.result()  # the server ended by itself: say why
            await self._drain()
            http_stop.set()
            # Before Python 3.13 a connection whose client reads nothing can hold the server up for ever.
            await asyncio.wait((http,), timeout=2 * SERVER_GRACE_S)
            http.cancel()
        finally:
            stop.cancel()
            activation.cancel()
            relief.cancel()
            await services.manager.shutdown(timeout_s=UNLOAD_TIMEOUT_S)
            if self._span_export is not None:
                await run_in_daemon_thread(self._span_export.close, name="traces-close")
            services.manager.weights.close()
            await self._served.close()
            services.hardware.stop()
            shutil.rmtree(self._runtime_dir, ignore_errors=True)
            os.close(self._runtime_lock)

    async def _drain(self) -> None:
        services, manager = self.services, self.services.manager
        logger.info("shutting down: admission is closed")
        self._heartbeat.stopping()
        services.is_draining = True
        manager.close_admission()
        drained = asyncio.create_task(manager.drained())
        hurry = asyncio.create_task(self._hurry.wait())
        grace_s = self._config.server.drain_grace_s
        await asyncio.wait((drained, hurry), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            in_flight = sum(model.admission.in_flight for model in manager.all())
            logger.warning("shutting down: %d requests are ended after the grace time", in_flight)
            manager.fail_requests()
            await asyncio.wait((drained,), timeout=SERVER_GRACE_S)
        for task in (drained, hurry):
            task.cancel()

    def _on_text_end(self, model: ServedModel, reason: LostReason) -> None:
        self.services.metrics.text_workers_ended.labels(model.id, reason).inc()

    def _on_loaded(self, model: ServedModel) -> None:
        for reason in LOST_REASONS:
            self.services.metrics.text_workers_ended.labels(model.id, reason)
        if model.load_seconds is not None:
            self.services.metrics.load_seconds.labels(model.id).observe(model.load_seconds)


def serve(config: NeuronConfig, *, on_ready: Callable[[str], None]) -> int:
    """Run a daemon until a signal ends it; `on_ready` gets the URL once it listens. Returns the exit code."""

    raise_descriptor_limit()
    heartbeat = Heartbeat.from_environ(os.environ)

    async def main() -> int:
        try:
            daemon = Daemon(config, heartbeat=heartbeat)
        except ConfigError as exc:
            logger.error("configuration refused\n%s", exc)
            return EXIT_CONFIG
        try:
            url = daemon.bind()
        except OSError as exc:
            logger.error("cannot listen on %s port %d: %s", config.host, config.port, exc)
            return 1
        heartbeat.when_asked_to_end(daemon.request_stop)
        on_ready(url)
        garbage.settle()
        await daemon.serve()
        return 0

    code = _run(main())
    # A thread may sit in a driver or in a download for ever; nothing of ours is left to finish (F33).
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(main: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def _serve_http(
    app: NeuronApp, listener: socket.socket, table: ConnectionTable, stop: asyncio.Event, *, on_open: Callable[[], None]
) -> None:
    """hypercorn on a listener that is bound already; returns after `stop`, when its connections have ended."""
    config = Config()
    config.keep_alive_max_requests = sys.maxsize
    config.graceful_timeout = SERVER_GRACE_S
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("neuron.http")
    config.loglevel = "WARNING"
    with listener:
        await serve_http(app, config, listener, table, stop, name="listener", on_open=on_open)


def _connection_table(server: ServerSection) -> ConnectionTable:
    asked = server.max_connections
    limit = connection_limit(descriptor_limit(), reserve=OWN_DESCRIPTORS, descriptors_each=1, asked=asked)
    if asked is not None and limit < asked:
        logger.warning("server.max_connections: %d of %d, as descriptors allow no more", limit, asked)
    unread_s = server.write_timeout_s
    return ConnectionTable(limit, idle_s=KEEP_ALIVE_S, head_s=HEAD_S, unread_s=unread_s, clock=time.monotonic)


def _listen(host: str, port: int) -> socket.socket:
    info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(info[0], info[1])
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def state_path(config: NeuronConfig) -> Path | None:
    """The file with the list of served models, one for each port that may be asked for; None where none is kept.

    In the configured folder, else systemd's state folder, else the user's. A neuron on a port that the kernel picks
    has no identity to come back under: it keeps a list only in a folder that was named.
    """
    folder = config.state_dir
    if folder is None:
        if config.port == 0:
            return None
        folder = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if not folder:
            state_home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
            folder = f"{state_home}/neuron"
    return Path(folder).expanduser() / f"served-{config.port}.json" if folder else None


def _ids_of(specs: Iterable[ModelSpec], sources: Sources) -> list[str]:
    """Ids that the specs are served under; what is no id is reported when it is to be loaded."""
    ids = []
    for spec in specs:
        with contextlib.suppress(ApiError):
            ids.append(sources.public_id(spec.model_id))
    return ids


def _make_runtime_dir() -> tuple[Path, int]:
    """A private folder (mode 0700) for engine sockets, in systemd's runtime folder if there is one, and its lock.

    Folders of daemons that were killed, which nobody holds any more, are removed.
    """
    named = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0] or os.environ.get("XDG_RUNTIME_DIR") or None
    parent = Path(tempfile.gettempdir() if named is None or not os.access(named, os.W_OK) else named)
    for lock in parent.glob("neuron-*/lock"):
        if lock.stat(follow_symlinks=False).st_uid == os.getuid() and (held := _try_lock(lock)) is not None:
            shutil.rmtree(lock.parent, ignore_errors=True)
            os.close(held)
    folder = Path(tempfile.mkdtemp(prefix="neuron-", dir=parent))
    new = folder / "lock.new"  # it is held before anybody can see it
    new.touch(mode=0o600)
    held = _try_lock(new)
    assert held is not None
    new.rename(folder / "lock")
    return folder, held


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, None if another process does, or removed the file first."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _make_weight_cache(config: NeuronConfig, discovery: DiscoveryResponse, *, floor_bytes: int) -> WeightCache:
    """As configured, else by the memory that is free now."""
    budget_mb = config.engine.weight_cache_mb
    free_bytes = memory_free_mb() * 2**20
    budget = default_budget_bytes(free_bytes, has_devices=bool(discovery.devices))
    if budget_mb is not None:
        budget = budget_mb * 2**20
    # What keeps others running comes before what only makes them come back faster.
    headroom_bytes = max(2 * floor_bytes, discovery.memory_total_mb * 2**20 // 20)
    return WeightCache(budget, free_bytes=lambda: memory_free_mb() * 2**20, headroom_bytes=headroom_bytes)


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), ApiError):
        logger.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())
