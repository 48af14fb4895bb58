"""Serve a gateway: bind, run, drain on SIGTERM. The HTTP server is named nowhere else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cortex_core.catalogue import Catalogue, load_catalogue
from cortex_core.config import ConfigError
from cortex_core.gateway_config import GatewayConfig, Http1Parser
from cortex_core.serving import garbage
from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.descriptors import connection_limit, descriptor_limit, raise_descriptor_limit
from cortex_core.serving.heartbeat import Heartbeat
from cortex_core.serving.http_connections import serve_http
from cortex_core.serving.listener import prepare
from prometheus_client import disable_created_metrics

from cortex_gateway.app import Gateway
from cortex_gateway.http.asgi import ASGIApp
from cortex_gateway.http.http1 import gateway_connection
from cortex_gateway.identity.store import StoreError
from cortex_gateway.observability.logs import configure_logging
from cortex_gateway.routes.access import exposures
from cortex_gateway.routes.metrics import MetricsApp

logger = logging.getLogger(__name__)

BACKLOG = 4096
"""What the kernel keeps before it is accepted, if `net.core.somaxconn` allows it. Beyond that, who connects tries again
after a second."""
MAX_HEADER_BYTES = 64 * 1024
"""Request line and headers together; more is a 431."""
KEEP_ALIVE_S = 75
"""How long a connection may be without a request."""
HEAD_S = 30
"""How long the headers of a request may take, from their first byte."""
OWN_DESCRIPTORS = 128
"""For what is not a client's connection or a neuron's: files, stores, polls, listeners, refused connections."""
METRICS_CONNECTIONS = 64
CLOSE_TIMEOUT_S = 5
"""How long connections get to close once the drain is over."""

EXIT_CONFIG = 2


class RunningGateway:
    """A gateway that listens. `url` and `metrics_url` name the ports that were really bound."""

    def __init__(self, gateway: Gateway, url: str, metrics_url: str) -> None:
        self.gateway = gateway
        self.url = url
        self.metrics_url = metrics_url
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_failed(self) -> None:
        """Returns only if a listener ended by itself, by raising why."""
        await asyncio.shield(self._failed)

    def _listener_ended(self, task: asyncio.Task[None]) -> None:
        if self._failed.done() or task.cancelled():
            return
        self._failed.set_exception(task.exception() or RuntimeError(f"{task.get_name()} ended"))
        self._failed.exception()  # seen


@asynccontextmanager
async def running(
    config: GatewayConfig,
    catalogue: Catalogue | None = None,
    *,
    grace_s: float | None = None,
    config_path: Path | str | None = None,
) -> AsyncIterator[RunningGateway]:
    """A listening gateway in this event loop; leaving the context drains it (`grace_s`: config's by default).

    Port 0 in `listen` or `metrics_listen` takes a free one. config_path: the file that `config` and `catalogue` were
    read from; it is watched. Raises `OSError` where a port cannot be bound,
    `ConfigError` where a secret is missing, `StoreError` where keys and budgets cannot be reached.
    """
    gateway = Gateway(config, catalogue, config_path=config_path)
    write_timeout_s = config.gateway.write_timeout_s
    with (
        bind(config.gateway.listen, write_timeout_s=write_timeout_s) as listener,
        bind(config.gateway.metrics_listen, write_timeout_s=write_timeout_s) as metrics_listener,
    ):
        stop, stop_metrics = asyncio.Event(), asyncio.Event()
        gateway_connection.has_httptools(config.gateway.http1_parser)  # raises before anything is open
        await gateway.startup()  # before the first request can arrive
        http1 = config.gateway.http1_parser
        table = _table(_max_connections(config.gateway.max_connections), unread_s=write_timeout_s)
        gateway.relay.max_active = max(descriptor_limit() - OWN_DESCRIPTORS - table.limit, table.limit)
        server = _start(gateway, listener, stop, "listener", http1, table)
        metrics_table = _table(METRICS_CONNECTIONS, unread_s=write_timeout_s)
        gateway.metrics.observe_connections({"api": table, "metrics": metrics_table})
        metrics_app = MetricsApp(gateway.metrics, gateway.access)
        metrics_server = _start(metrics_app, metrics_listener, stop_metrics, "metrics listener", http1, metrics_table)
        started = RunningGateway(gateway, url_of(listener), url_of(metrics_listener))
        for exposure in exposures(config, address_of(listener), address_of(metrics_listener)):
            logger.warning("open: %s", exposure)
        for task in (server, metrics_server):
            task.add_done_callback(started._listener_ended)
        try:
            yield started
        finally:
            # Cancelled (by a second signal), each step is still done, without what waiting there is in the one before.
            try:
                await gateway.drain(gateway.current.config.gateway.drain_grace_s if grace_s is None else grace_s)
            finally:
                try:
                    await _close(server, stop)
                finally:
                    await gateway.shutdown()
                    await _close(metrics_server, stop_metrics)


def serve(config: GatewayConfig, catalogue: Catalogue | None = None, *, config_path: Path | str | None = None) -> int:
    """Run a gateway until SIGTERM or SIGINT; returns the exit code. A second signal skips the drain.

    Without `catalogue` the one named in the configuration is read; then, where `config_path` says which file that was,
    both are read again on SIGHUP and when they change. Uses uvloop where it is installed.
    """
    configure_logging()
    raise_descriptor_limit()
    heartbeat = Heartbeat.from_environ(os.environ)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series
    is_from_files = catalogue is None and config_path is not None
    if is_from_files:
        # Until the loop can take it: a reload that comes too early must not be the end.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        catalogue = catalogue if catalogue is not None else load_catalogue(config.models_config)
    except ConfigError as error:
        logger.error("catalogue refused\n%s", error)
        return EXIT_CONFIG
    logger.info("starting cortex neurons=%d listen=%s", len(config.neurons), config.gateway.listen)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            runner.run(_serve(config, catalogue, config_path, heartbeat, reloads=is_from_files))
        except ConfigError as error:
            logger.error("configuration refused\n%s", error)
            return EXIT_CONFIG
        except StoreError as error:
            logger.error("keys and budgets cannot be reached: %s", error)
            return 1
        except OSError as error:
            logger.error("cannot listen: %s", error)
            return 1
    return 0


async def _serve(
    config: GatewayConfig,
    catalogue: Catalogue,
    config_path: Path | str | None,
    heartbeat: Heartbeat,
    *,
    reloads: bool,
) -> None:
    loop = asyncio.get_running_loop()
    asked_to_stop, asked_to_reload = asyncio.Event(), asyncio.Event()
    main = asyncio.current_task()

    def on_signal() -> None:
        if asked_to_stop.is_set():
            logger.warning("second signal: not waiting any longer")
            if main is not None:
                main.cancel()
            return
        asked_to_stop.set()

    heartbeat.when_asked_to_end(on_signal)
    if reloads:
        loop.add_signal_handler(signal.SIGHUP, asked_to_reload.set)
    with suppress(asyncio.CancelledError):
        async with running(config, catalogue, config_path=config_path if reloads else None) as started:
            logger.info("prometheus metrics exporter on %s/metrics", started.metrics_url)
            num_models, num_neurons = len(catalogue.models), len(config.neurons)
            logger.info(
                "cortex listening on %s (config %s, %d neuron%s, %d model%s in the catalogue)",
                started.url,
                config_path or "built in",
                num_neurons,
                "" if num_neurons == 1 else "s",
                num_models,
                "" if num_models == 1 else "s",
            )
            garbage.settle()
            heartbeat.serving()
            stopping = asyncio.ensure_future(asked_to_stop.wait())
            failing = asyncio.ensure_future(started.wait_failed())
            reloading = asyncio.ensure_future(_reload_when(asked_to_reload, started.gateway, heartbeat))
            waited_for = {stopping, failing, reloading}
            done, pending = await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            heartbeat.stopping()
            for future in pending:
                future.cancel()
            for future in done:
                future.result()
    logger.info("stopped")


async def _reload_when(asked: asyncio.Event, gateway: Gateway, heartbeat: Heartbeat) -> None:
    while True:
        await asked.wait()
        asked.clear()
        if gateway.reloader is not None:
            heartbeat.reloading()
            await gateway.reloader.try_reload("signal")
            heartbeat.serving()


# ---------------------------------------------------------------------------------------------- the server


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: the same CPU, but events wait a third as long."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def bind(address: str, *, write_timeout_s: float = 0) -> socket.socket:
    """A listening address: `host:port`, `[v6]:port`, or `fd://N` for a socket handed down by a supervisor.

    Its connections are cut by the kernel (Linux) when what was written to them is not taken for `write_timeout_s`:
    a client that does not read holds a connection, a few buffers and a neuron's place no longer than that. 0: never.
    """
    if address.startswith("fd://"):
        return prepare(socket.socket(fileno=int(address.removeprefix("fd://"))), write_timeout_s=write_timeout_s)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return prepare(listener, write_timeout_s=write_timeout_s)


def address_of(listener: socket.socket) -> str:
    """That is listened on; a socket in the file system is as close as the loopback."""
    return str(listener.getsockname()[0]) if listener.family != socket.AF_UNIX else "127.0.0.1"


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _max_connections(asked: int | None) -> int:
    """Each may need another one to a neuron."""
    limit = connection_limit(descriptor_limit(), reserve=OWN_DESCRIPTORS, descriptors_each=2, asked=asked)
    if asked is not None and limit < asked:
        logger.warning("gateway.max_connections: %d of %d, as descriptors allow no more", limit, asked)
    return limit


def _table(limit: int, *, unread_s: float = 0.0) -> ConnectionTable:
    clock = asyncio.get_running_loop().time
    return ConnectionTable(limit, idle_s=KEEP_ALIVE_S, head_s=HEAD_S, unread_s=unread_s, clock=clock)


def _start(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    name: str,
    http1: Http1Parser,
    table: ConnectionTable | None = None,
) -> asyncio.Task[None]:
    server = gateway_connection.ServerConfig()
    server.has_httptools = gateway_connection.has_httptools(http1)
    server.keep_alive_max_requests = 100_000
    server.graceful_timeout = 10 * CLOSE_TIMEOUT_S  # `_close` is the one that gives up
    server.include_server_header = False
    server.errorlog = logging.getLogger("cortex_gateway.http")
    server.loglevel = "WARNING"
    server.h11_max_incomplete_size = server.h2_max_header_list_size = MAX_HEADER_BYTES
    table = table or _table(_max_connections(None))
    serving = serve_http(app, server, listener, table, stop, name=name, speaker=gateway_connection.GatewayConnection)
    return asyncio.create_task(serving, name=name)


async def _close(server: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Close a listener and its connections, whatever their clients do."""
    stop.set()
    done, _ = await asyncio.wait({server}, timeout=CLOSE_TIMEOUT_S)
    if not done:
        server.cancel()
        await asyncio.wait({server}, timeout=1)
