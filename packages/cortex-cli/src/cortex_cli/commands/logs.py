"""`cortex logs`: what a gateway did for each request."""

from __future__ import annotations

import json
from typing import Any

import click

from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(help="The gateway's access log: one line per request. Needs an admin key, or the gateway's own host.")
@endpoint_option
@click.option("-f", "--follow", is_flag=True, help="Go on with the lines to come, until interrupted.")
@click.option("-n", "--last", type=click.IntRange(min=0), default=50, show_default=True, help="Lines to begin with.")
@click.option("--model", help="Only requests for this model.")
@click.option("--failed", is_flag=True, help="Only requests that did not end well.")
@json_option
def logs(endpoint: str, follow: bool, last: int, model: str | None, failed: bool, as_json: bool) -> None:
    query = f"/admin/log?last={last}" + ("&follow=1" if follow else "")
    # A quiet gateway writes nothing for hours: while following, silence is no fault.
    for line in Gateway(endpoint, timeout_s=86_400.0 if follow else 30.0).lines(query):
        if not line:
            continue
        entry = json.loads(line)
        if model is not None and model not in (entry.get("model"), entry.get("resolved")):
            continue
        if failed and entry["outcome"] == "ok":
            continue
        click.echo(line if as_json else _shown(entry))


def _shown(entry: dict[str, Any]) -> str:
    """Time, place and size in the order in which one looks for them."""
    parts = [
        entry["id"],
        str(entry["status"]),
        entry["outcome"],
        f"{entry['duration_ms']:.0f}ms",
        f"{entry['method']} {entry['path']}",
    ]
    if "model" in entry:
        parts.append(entry["model"] + (f" ({entry['resolved']})" if "resolved" in entry else ""))
    if "node" in entry:
        parts.append(f"on {entry['node']}/{entry.get('route', '?')}")
    if "ttft_ms" in entry:
        parts.append(f"first {entry['ttft_ms']:.0f}ms")
    if "prompt_tokens" in entry or "completion_tokens" in entry:
        cached = f" ({entry['cached_tokens']} cached)" if entry.get("cached_tokens") else ""
        parts.append(f"{entry.get('prompt_tokens', '?')}{cached} -> {entry.get('completion_tokens', '?')} tokens")
    if entry.get("attempts", 0) > 1:
        parts.append(f"{entry['attempts']} attempts")
    if "error" in entry:
        parts.append(entry["error"])
    return "  ".join(parts)
