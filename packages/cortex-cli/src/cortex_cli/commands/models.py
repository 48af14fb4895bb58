"""`cortex models`: the catalogue as a table."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(help="Every model the fleet can serve: state, place, context.")
@endpoint_option
@json_option
def models(endpoint: str, as_json: bool) -> None:
    entries = Gateway(endpoint, timeout_s=30).get("/v1/models")["data"]
    if as_json:
        click.echo(json.dumps(entries))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("MODEL", "STATE", "NODES", "CAN RUN ON", "CONTEXT", "CAPABILITIES"):
        table.add_column(title, justify="right" if title == "CONTEXT" else "left", overflow="fold")
    for entry in entries:
        table.add_row(
            entry["id"],
            _state(entry),
            ", ".join(place["node"] for place in entry.get("locations", ())) or "-",
            ", ".join(entry.get("feasible_on", ())) or "-",
            str(entry.get("max_model_len") or "-"),
            ", ".join(_capabilities(entry)) or "-",
        )
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _state(entry: dict[str, Any]) -> str:
    if entry.get("loaded"):
        return "loaded"
    for place in entry.get("locations", ()):
        progress = place.get("progress")
        if progress and progress.get("bytes_total"):
            return f"{place['status']} {100 * progress['bytes_done'] // progress['bytes_total']}%"
        return str(place["status"])
    return "cold"


def _capabilities(entry: dict[str, Any]) -> list[str]:
    declared = entry.get("modalities") or entry.get("capabilities") or []
    names = [name for name in declared if isinstance(name, str)] if isinstance(declared, list) else []
    return names + [name for name in ("tool_call", "reasoning") if entry.get(name)]
