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
    from rich.console import Group


@click.command(help="A live view of the fleet: nodes, devices, models, load. Ctrl-C ends it.")
@endpoint_option
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look once and end.")
@json_option
def top(endpoint: str, interval: float, once: bool, as_json: bool) -> None:
    gateway = Gateway(endpoint, timeout_s=30)
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


def _looks(gateway: Gateway, endpoint: str) -> Iterator[Any]:
    """A gateway that restarts is waited for: the view says so and goes on."""
    while True:
        try:
            yield view(gateway.get("/admin/fleet"), endpoint)
        except CliError as exc:
            if exc.exit_code != EXIT_UNREACHABLE:
                raise
            yield f"{endpoint}: {exc}"


def view(fleet: dict[str, Any], endpoint: str) -> Group:
    """Two tables: nodes with their devices, and models by node."""
    from rich.console import Group
    from rich.table import Table

    nodes = Table("NODE", "HEALTH", "DEVICES", "FREE", "POLLED", "NOTE", title=f"{endpoint}", box=None)
    models = Table("MODEL", "NODE", "STATE", "IN FLIGHT", "MEMORY", "NOTE", box=None)
    for node in fleet["nodes"]:
        devices = node.get("devices") or []
        free = sum(device.get("vram_free_mb") or 0 for device in devices) or node.get("memory_free_mb") or 0
        polled = node.get("polled_s_ago")
        nodes.add_row(
            node["name"],
            _coloured(node["health"], node["health"] == "healthy"),
            str(len(devices) or "cpu"),
            f"{free / 1024:.1f} GiB",
            "-" if polled is None else f"{polled:.0f} s ago",
            "draining" if node.get("draining") else (node.get("last_error") or "")[:80],
        )
        for model in node["models"]:
            used = model.get("vram_used_mb")
            models.add_row(
                model["id"],
                node["name"],
                _coloured(model["status"], model["status"] == "loaded"),
                str(model.get("in_flight", 0)),
                "-" if not used else f"{used / 1024:.1f} GiB",
                _note(model),
            )
    waiting = [
        f"{queue['requests']} wait for {queue['model']}, the first for {queue['waited_s']:.0f} s"
        for queue in fleet.get("waiting", ())
    ]
    summary = "; ".join([f"{fleet.get('in_flight', 0)} requests in flight", *waiting])
    return Group(nodes, "", models, "", summary)


def _coloured(text: str, is_good: bool) -> str:
    return f"[green]{text}[/]" if is_good else f"[yellow]{text}[/]"


def _note(model: dict[str, Any]) -> str:
    progress = model.get("progress")
    parts = []
    if isinstance(progress, dict) and progress.get("bytes_total"):
        parts.append(f"{progress['phase']} {100 * progress['bytes_done'] // progress['bytes_total']} %")
    if model.get("pinned"):
        parts.append("pinned")
    if model.get("breaker") not in (None, "closed"):
        parts.append(f"breaker {model['breaker']}")
    if model.get("servable") is False:
        parts.append("cannot serve now")
    if model.get("error"):
        parts.append(str(model["error"])[:80])
    return ", ".join(parts)
