"""`cortex top`: the fleet as it is now, again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from cortex_cli.exits import EXIT_UNREACHABLE, CliError
from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text


@click.command(help="A live view of the fleet: nodes, devices, models, load. Ctrl-C ends it.")
@endpoint_option
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look once and end.")
@json_option
def top(endpoint: str, interval: float, once: bool, as_json: bool) -> None:
    gateway = Gateway(endpoint, timeout_s=30 if once or as_json else 5)
    if as_json:
        click.echo(json.dumps(gateway.get("/admin/fleet?refresh=1")))
        return
    from rich.console import Console
    from rich.live import Live

    if once:
        Console().print(view(gateway.get("/admin/fleet?refresh=1"), endpoint))
        return
    with Live(auto_refresh=False, screen=True) as live, suppress(KeyboardInterrupt):
        for shown in _looks(gateway, endpoint):
            live.update(shown, refresh=True)
            time.sleep(interval)


def _looks(gateway: Gateway, endpoint: str) -> Iterator[RenderableType]:
    """A gateway that restarts is waited for: the view says so and goes on."""
    from rich.text import Text

    while True:
        try:
            yield view(gateway.get("/admin/fleet"), endpoint)
        except CliError as exc:
            if exc.exit_code != EXIT_UNREACHABLE:
                raise
            yield Text(f"{time.strftime('%H:%M:%S')}  {exc}", style="red")


def view(fleet: dict[str, Any], endpoint: str) -> Group:
    """Sums, two tables (nodes with their devices, models by node), and a line for whatever needs a look.

    Texts of others are no markup.
    """
    from rich.console import Group
    from rich.text import Text

    nodes = fleet["nodes"]
    num_waiting = sum(queue["requests"] for queue in fleet.get("waiting", ()))
    sums = [
        f"{sum(node['health'] == 'healthy' for node in nodes)} of {len(nodes)} nodes healthy",
        f"{fleet.get('in_flight', 0)} requests in flight",
        f"{num_waiting} waiting",
    ]
    head = Text(f"{endpoint}  {time.strftime('%H:%M:%S')}", style="bold")
    notes = [f"{node['name']}: {note}" for node in nodes if (note := _node_note(node))]
    notes += [
        f"{model['id']} on {node['name']}: {note}"
        for node in nodes
        for model in node["models"]
        if (note := _model_note(model))
    ]
    notes += [
        f"{queue['requests']} wait for {queue['model']}, the first for {_span(queue['waited_s'])}{_wait_note(queue)}"
        for queue in fleet.get("waiting", ())
    ]
    notes += [f"{count} go on on {name}, which was taken out" for name, count in fleet.get("leaving", {}).items()]
    files = fleet.get("configuration", {})
    notes += [f"configuration refused: {fault}" for fault in files.get("faults", ())]
    notes += [f"configuration refused, `cortex reload` applies it: {what}" for what in files.get("weaker", ())]
    parts: list[RenderableType] = [head, Text("  ".join(sums)), "", _nodes(nodes), "", _models(nodes)]
    if notes:
        parts += ["", Text("\n".join(notes), style="yellow")]
    return Group(*parts)


def _nodes(nodes: list[dict[str, Any]]) -> Table:
    rows: list[list[str | Text]] = []
    for node in nodes:
        first = [node["name"], _state(node["health"], "healthy"), _span(node.get("uptime_secs"))]
        found = {device["index"]: device for device in (node.get("discovery") or {}).get("devices", ())}
        for device in node.get("devices") or ():
            name = found.get(device["index"], {}).get("name", "device")
            used = device["vram_used_mb"]
            rows.append(
                [
                    *first,
                    f"{device['index']} {name}",
                    _share(used, used + device["vram_free_mb"]),
                    f"{device['utilization_pct']} %",
                    f"{device['temp_c']} °C",
                ]
            )
            first = ["", "", ""]
        if not node.get("devices"):
            host, free = node.get("discovery") or {}, node.get("memory_free_mb") or 0
            total = host.get("memory_total_mb") or 0
            cores = f"cpu, {host['cpu_count']} cores" if host.get("cpu_count") else ""
            rows.append([*first, cores, _share(total - free, total) if total and free else "", "", ""])
    return _table(("NODE", "HEALTH", "UP", "DEVICE", "MEMORY GiB", "BUSY", "TEMP"), rows)


def _models(nodes: list[dict[str, Any]]) -> RenderableType:
    """HERE: requests through this gateway; ALL: at work on the neuron, whoever sent them. Speeds in tokens a second."""
    from rich.text import Text

    rows: list[list[str | Text]] = []
    for node in nodes:
        for model in node["models"]:
            load = model.get("load") or {}
            budget = load.get("kv_budget_mb") or 0
            used = model.get("vram_used_mb")
            ceiling = f"/{load['max_in_flight']}" if load.get("max_in_flight") else ""
            rows.append(
                [
                    model["id"],
                    node["name"],
                    _state(model["status"] or "unknown", "loaded"),
                    str(model.get("in_flight", 0)),
                    f"{load['in_flight']}{ceiling}" if load else "",
                    str(load["queue_depth"]) if load else "",
                    f"{100 * (budget - load['kv_available_mb']) / budget:.0f} %" if budget else "",
                    _rate(load.get("tok_s_prefill")),
                    _rate(load.get("tok_s_decode")),
                    f"{used / 1024:.1f}" if used else "",
                ]
            )
    names = ("MODEL", "NODE", "STATE", "HERE", "ALL", "QUEUE", "KV", "PREFILL", "DECODE", "GiB")
    return _table(names, rows) if rows else Text("no models")


def _table(names: tuple[str, ...], rows: list[list[str | Text]]) -> Table:
    """Columns without content are left out: it has to fit 80 characters."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    kept = [index for index in range(len(names)) if any(row[index] for row in rows)]
    for index in kept:
        table.add_column(names[index], justify="right" if names[index] in _NUMBERS else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell := row[index], Text) else Text(cell) for index in kept))
    return table


_NUMBERS = frozenset(("HERE", "ALL", "QUEUE", "KV", "PREFILL", "DECODE", "GiB", "BUSY", "TEMP"))


def _state(text: str, good: str) -> Text:
    from rich.text import Text

    return Text(text, style="green" if text == good else "yellow")


def _node_note(node: dict[str, Any]) -> str:
    parts = ["draining"] if node.get("draining") else []
    polled = node.get("polled_s_ago")
    if node["health"] != "healthy" and polled is not None:
        parts.append(f"last seen {_span(polled)} ago")
    if node.get("last_error") and node["health"] != "healthy":
        parts.append(str(node["last_error"]))
    failed = [entry["model_id"] for entry in (node.get("activation") or {}).get("failed", ())]
    if failed:
        parts.append(f"not loaded at start: {', '.join(failed)}")
    return ", ".join(parts)


def _wait_note(queue: dict[str, Any]) -> str:
    wait = queue.get("for")  # older gateways do not say
    return f": for {wait['text']}" if wait else ""


def _model_note(model: dict[str, Any]) -> str:
    progress, servable = model.get("progress"), model.get("servable")
    parts = []
    if isinstance(progress, dict):
        share = f" {100 * progress['bytes_done'] // progress['bytes_total']} %" if progress.get("bytes_total") else ""
        left = f", {_span(progress['eta_s'])} left" if progress.get("eta_s") is not None else ""
        parts.append(f"{progress['phase']}{share}{left}")
    if model.get("pinned"):
        parts.append("pinned")
    if model.get("breaker") not in (None, "closed"):
        parts.append(f"breaker {model['breaker']}")
    if servable and not servable["ok"]:
        parts.append(f"cannot serve: {servable.get('detail') or servable.get('reason') or 'no reason given'}")
    if model.get("error"):
        parts.append(str(model["error"]))
    return ", ".join(parts)


def _share(used_mb: float, total_mb: float) -> str:
    return f"{used_mb / 1024:.1f} of {total_mb / 1024:.1f}"


def _rate(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.0f}" if tokens_per_second else ""


def _span(seconds: float | None) -> str:
    """A time in its two or one largest units."""
    if seconds is None:
        return ""
    total = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            rest = total % size // smaller_size
            return f"{total // size}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{total}s"
