"""`cortex captures`: the last exchanges of a gateway as they were."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import quote

import click
from cortex_core.serving.log_lines import printable

from cortex_cli.exits import CliError
from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option

_NOT_REPLAYED = ("host", "content-length", "content-encoding", "accept-encoding", "connection", "expect", "traceparent")
REMOVED = "[removed]"


@click.group(
    help="The last requests and answers of a gateway, as they were but for secrets. Off by default. Needs an admin "
    "key, or the gateway's own host."
)
def captures() -> None:
    pass


@captures.command("list", help="What is kept, the newest last.")
@endpoint_option
@json_option
def list_(endpoint: str, as_json: bool) -> None:
    answer = Gateway(endpoint, timeout_s=30).get("/admin/captures")
    if as_json:
        click.echo(json.dumps(answer))
        return
    for entry in answer["captures"]:
        click.echo(printable(_line(entry)))
    click.echo(_bounds(answer), err=True)


@captures.command(help="One exchange, by its request id (the x-request-id of its answer).")
@click.argument("request_id")
@click.option("--curl", is_flag=True, help="As a command that asks the same again.")
@endpoint_option
@json_option
def show(request_id: str, curl: bool, endpoint: str, as_json: bool) -> None:
    if curl and as_json:
        raise click.UsageError("Give either --curl or --json.")
    gateway = Gateway(endpoint, timeout_s=30)
    exchanged = gateway.get(f"/admin/captures/{quote(request_id, safe='')}")
    if as_json:
        click.echo(json.dumps(exchanged))
    elif curl:
        if exchanged["request"]["is_shortened"]:
            click.echo("images were shortened: what is sent again is not what was sent", err=True)
        click.echo(curl_of(exchanged, gateway.endpoint))
    else:
        click.echo(printable(_shown(exchanged)))


@captures.command(help="Forget what is kept.")
@endpoint_option
@json_option
def clear(endpoint: str, as_json: bool) -> None:
    answer = Gateway(endpoint, timeout_s=30).delete("/admin/captures")
    click.echo(json.dumps(answer) if as_json else f"forgot {answer['cleared']}")


@captures.command(help="Keep the last N exchanges from now on, until the gateway ends or `stop`.")
@click.option("-n", "--exchanges", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many.")
@endpoint_option
@json_option
def start(exchanges: int, endpoint: str, as_json: bool) -> None:
    _switch(endpoint, exchanges, as_json=as_json)


@captures.command(help="Keep no more, and forget what is kept.")
@endpoint_option
@json_option
def stop(endpoint: str, as_json: bool) -> None:
    _switch(endpoint, 0, as_json=as_json)


def _switch(endpoint: str, exchanges: int, *, as_json: bool) -> None:
    answer = Gateway(endpoint, timeout_s=30).post("/admin/captures", {"exchanges": exchanges})
    click.echo(json.dumps(answer) if as_json else _bounds(answer))


def _bounds(answer: dict[str, Any]) -> str:
    if not answer["exchanges"]:
        return "nothing is captured; `cortex captures start`, or `capture.exchanges` in cortex.toml, changes that"
    return (
        f"the last {answer['exchanges']} exchanges are kept, {_size(answer['exchange_bytes'])} of each and "
        f"{_size(answer['total_bytes'])} of all; {_size(answer['bytes'])} are in use"
    )


def _line(entry: dict[str, Any]) -> str:
    parts = [
        entry["id"],
        str(entry["status"]),
        entry["outcome"],
        f"{entry['duration_ms']:.0f}ms",
        entry["path"],
        entry.get("model", "-"),
        f"on {entry['node']}" if "node" in entry else "-",
        f"{_size(entry['request_bytes'])} -> {_size(entry['answer_bytes'])}",
    ]
    if entry["is_cut"]:
        parts.append("cut")
    return "  ".join(parts)


def _shown(exchanged: dict[str, Any]) -> str:
    """As the two sides saw it, with times in milliseconds since the request came."""
    request, answer = exchanged["request"], exchanged["answer"]
    query = f"?{request['query']}" if request["query"] else ""
    lines = [f"> {request['method']} {request['path']}{query}"]
    lines += [f"> {name}: {value}" for name, value in request["headers"]]
    lines += ["", request["body"] if request["body"] is not None else "(no body was read)"]
    if request["is_cut"]:
        lines.append(f"(cut: {_size(request['num_bytes'])} came)")
    lines.append("")
    lines += [
        f"* {entry['at_ms']:9.1f} ms  sent to {entry['node']} ({entry['route']})" for entry in exchanged["attempts"]
    ]
    lines += ["", f"< {answer['status']}"]
    lines += [f"< {name}: {value}" for name, value in answer["headers"]]
    lines.append("")
    for piece in answer["pieces"]:
        first, *rest = piece["text"].rstrip("\n").split("\n")
        lines.append(f"{piece['at_ms']:11.1f} ms  {first}")
        lines += [f"{'':15} {line}" for line in rest]
    if answer["is_cut"]:
        lines.append(f"(cut: {_size(answer['num_bytes'])} were sent)")
    summary = exchanged["summary"]
    ended = f"{summary['outcome']} after {summary['duration_ms']:.0f} ms"
    lines += ["", f"* {ended}" + (f": {summary['error']}" if "error" in summary else "")]
    return "\n".join(lines)


def curl_of(exchanged: dict[str, Any], endpoint: str) -> str:
    """The request as a shell command; the key, if there was one, comes from `CORTEX_API_KEY`.

    Raises `CliError` where the body is not all there.
    """
    request = exchanged["request"]
    if request["is_cut"] or request["body"] is None:
        raise CliError("the body of this request was not kept whole, so it cannot be sent again")
    query = f"?{request['query']}" if request["query"] else ""
    parts = [f"curl -sN -X {request['method']} {shlex.quote(endpoint + request['path'] + query)}"]
    for name, value in request["headers"]:
        if value == REMOVED:
            if name in ("authorization", "x-api-key"):
                bearer = "Bearer " if name == "authorization" else ""
                parts.append(f'-H "{name}: {bearer}$CORTEX_API_KEY"')
        elif name not in _NOT_REPLAYED:
            parts.append(f"-H {shlex.quote(f'{name}: {value}')}")
    parts.append(f"--data-binary {shlex.quote(request['body'])}")
    return " \\\n  ".join(parts)


def _size(num_bytes: int) -> str:
    if num_bytes < 1024:
        return f"{num_bytes} B"
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"
