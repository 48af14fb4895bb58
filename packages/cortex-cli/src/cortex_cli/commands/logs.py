"""`cortex logs`: what a gateway did for each request."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click
from cortex_core.serving.log_lines import shown

from cortex_cli.exits import EXIT_FAILED, EXIT_UNREACHABLE, CliError
from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option

RETRY_S = 1.0


@click.command(help="The gateway's access log: one line per request. Needs an admin key, or the gateway's own host.")
@endpoint_option
@click.option("-f", "--follow", is_flag=True, help="Go on with the lines to come, until interrupted.")
@click.option("-n", "--last", type=click.IntRange(min=0), default=50, show_default=True, help="Lines to begin with.")
@click.option("--model", help="Only requests for this model.")
@click.option("--failed", is_flag=True, help="Only requests that did not end well.")
@json_option
def logs(endpoint: str, follow: bool, last: int, model: str | None, failed: bool, as_json: bool) -> None:
    for line in (
        _followed(endpoint, last) if follow else Gateway(endpoint, timeout_s=30.0).lines(f"/admin/log?last={last}")
    ):
        if not line:
            continue
        entry = json.loads(line)
        if model is not None and model not in (entry.get("model"), entry.get("resolved")):
            continue
        if failed and entry["outcome"] == "ok":
            continue
        click.echo(line if as_json else _shown(entry))


def _followed(endpoint: str, last: int) -> Iterator[str]:
    """The last lines and those to come, until interrupted: a gateway that ends is waited for."""
    # A quiet gateway writes nothing for hours: silence is no fault.
    gateway = Gateway(endpoint, timeout_s=86_400.0)
    seen, is_lost, is_repeating = 0.0, False, False
    while True:
        try:
            for line in gateway.lines(f"/admin/log?last={last}&follow=1"):
                if is_lost:
                    click.echo(f"{endpoint} is back", err=True)
                    is_lost = False
                at = json.loads(line).get("at", 0.0) if line else 0.0
                if is_repeating and at <= seen:
                    continue
                is_repeating, seen = False, at
                yield line
        except CliError as exc:
            # Only one that was there is waited for: a wrong address is said at once.
            if not (seen or is_lost) or exc.exit_code not in (EXIT_UNREACHABLE, EXIT_FAILED):
                raise
        if not is_lost:
            click.echo(f"{endpoint} has ended the log; waiting for it to come back", err=True)
            is_lost, last = True, 1000
        is_repeating = True
        time.sleep(RETRY_S)


def _shown(entry: dict[str, Any]) -> str:
    """Time, verdict and place in the order in which one looks for them; the id last, for `cortex captures show`."""
    entry = {name: shown(value) if isinstance(value, str) else value for name, value in entry.items()}
    status = entry["status"]
    colour = "green" if status < 400 else "yellow" if status < 500 else "red"
    model = entry.get("model", "")
    parts = [
        _clock(entry.get("at")),
        click.style(str(status), fg=colour),
        f"{_duration(entry['duration_ms']):>8}",
        f"{entry['method']} {entry['path']}" if entry["method"] != "POST" else entry["path"],
    ]
    if entry["outcome"] not in ("ok", "rejected"):
        parts.append(click.style(entry["outcome"], fg=colour if status >= 400 else "yellow"))
    if model:
        parts.append(model + (f" = {entry['resolved']}" if "resolved" in entry else ""))
    if "node" in entry:
        parts.append(f"{entry['node']}/{entry.get('route', '?')}")
    if "ttft_ms" in entry:
        parts.append(f"first {_duration(entry['ttft_ms'])}")
    if "prompt_tokens" in entry or "completion_tokens" in entry:
        cached = f" ({entry['cached_tokens']} cached)" if entry.get("cached_tokens") else ""
        parts.append(f"{entry.get('prompt_tokens', '?')}{cached} -> {entry.get('completion_tokens', '?')} tokens")
    if "finish" in entry:
        parts.append(",".join(entry["finish"]))
    if entry.get("attempts", 0) > 1:
        resumes = f", {entry['resumes']} resumed" if entry.get("resumes") else ""
        parts.append(click.style(f"{entry['attempts']} attempts{resumes}", fg="yellow"))
    if "key" in entry:
        parts.append(f"key {entry['key']}")
    if "error" in entry:
        parts.append(_error(entry["error"]))
    parts.append(click.style(entry["id"], dim=True))
    return "  ".join(parts)


def _clock(at: float | None) -> str:
    """In the reader's own time zone."""
    if at is None:
        return ""
    moment = datetime.fromtimestamp(at)
    date = "" if moment.date() == datetime.now().date() else f"{moment:%Y-%m-%d} "
    return f"{date}{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"


def _duration(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s" if milliseconds < 100_000 else f"{milliseconds / 1000:.0f} s"


def _error(text: str) -> str:
    """What a neuron answered is kept as it came: of its document only code and message are of interest here."""
    try:
        error = json.loads(text)["error"]
        return shown(f"{error.get('code') or error.get('type')}: {error['message']}")
    except (ValueError, TypeError, KeyError, AttributeError):
        return shown(text)
