"""Prometheus metrics of connections and of log lines, under the names of either server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex_core.serving.connection_table import REASONS, STATES, ConnectionTable
from cortex_core.serving.log_lines import left_out


class ConnectionCollector(Collector):
    """prefix: of the names. tables: of each listener, by its name; they may be added later."""

    def __init__(self, prefix: str, tables: Mapping[str, ConnectionTable]) -> None:
        self._prefix = prefix
        self._tables = tables

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        prefix = self._prefix
        connections = GaugeMetricFamily(
            f"{prefix}_connections",
            "Clients' connections that are open, by what they are at: idle, receiving a body, stalled by a client that "
            "does not read, working.",
            labels=("listener", "state"),
        )
        limit = GaugeMetricFamily(
            f"{prefix}_connections_limit", "The most that are open at once.", labels=("listener",)
        )
        accepted = CounterMetricFamily(
            f"{prefix}_connections_accepted", "Connections that clients opened.", labels=("listener",)
        )
        ended = CounterMetricFamily(
            f"{prefix}_connections_ended",
            "Connections that the server ended by itself, by reason.",
            labels=("listener", "reason"),
        )
        for name, table in self._tables.items():
            for state in STATES:
                connections.add_metric((name, state), table.num_in(state))
            limit.add_metric((name,), table.limit)
            accepted.add_metric((name,), table.num_accepted)
            for reason in REASONS:
                ended.add_metric((name, reason), table.ended[reason])
        lines = CounterMetricFamily(
            f"{prefix}_log_lines_left_out",
            "Log lines that were counted instead of written, as there were too many of their kind.",
            labels=("kind",),
        )
        for kind in ("lines", "requests"):
            lines.add_metric((kind,), left_out[kind])
        yield from (connections, limit, accepted, ended, lines)
