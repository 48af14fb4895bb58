"""`cortex keys`: make, list and revoke API keys. Works on the gateway's store itself, whether one runs or not."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cortex_cli.exits import EXIT_NOT_FOUND, CliError
from cortex_cli.options import config_option, json_option

if TYPE_CHECKING:
    from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry
    from cortex_gateway.identity.store import BookedUse, KeyRecord, Store
    from cortex_gateway.identity.store_time import Moment

T = TypeVar("T")

UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d+)([smhd])")
_BUDGET = re.compile(r"(?P<usd>\$)?(?P<amount>\d+(?:\.\d+)?)(?P<scale>[kM])?(?:/(?P<rolling>rolling:)?(?P<span>\w+))?")


class Duration(click.ParamType):  # type: ignore[type-arg]  # no generic in older clicks
    """Seconds, from `90s`, `15m`, `24h`, `30d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _DURATION.fullmatch(value)
        if match is None:
            self.fail(f"`{value}` is no duration; write 90s, 15m, 24h or 30d", param, ctx)
        return int(match[1]) * UNIT_S[match[2]]


class BudgetSpec(click.ParamType):  # type: ignore[type-arg]
    """`2M` tokens in all, `500k/1d` in each UTC day, `500k/rolling:24h` in any 24 hours, `$5/30d` in money."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Budget:
        from cortex_core.entitlements import Budget, Window

        match = _BUDGET.fullmatch(value)
        if match is None:
            self.fail(f"`{value}` is no budget; write 2M, 500k/1d, 500k/rolling:24h or $5/30d", param, ctx)
        window = Window()
        if match["span"]:
            seconds = Duration().convert(match["span"], param, ctx)
            window = Window(kind="rolling" if match["rolling"] else "fixed", seconds=max(seconds, 1))
        amount = float(match["amount"]) * {"k": 1e3, "M": 1e6, None: 1}[match["scale"]]
        if amount <= 0 or (not match["usd"] and amount != int(amount)):
            self.fail(f"`{value}`: a budget is a positive, whole number of tokens", param, ctx)
        return Budget(cost_usd=amount, window=window) if match["usd"] else Budget(tokens=int(amount), window=window)


@click.group(help="Make, list and revoke the API keys of a gateway.")
def keys() -> None:
    pass


@keys.command(
    help="Make a key called NAME and print it: this once, since only its hash is kept. What is not given is not "
    "limited. A running gateway knows it within seconds."
)
@click.argument("name")
@click.option("--account", help="Whose key it is; several keys may share an account. Default: NAME.")
@click.option("--admin", is_flag=True, help="The key may use the admin routes.")
@click.option("--model", "models", multiple=True, help="Model or alias it may use, or a pattern (repeatable).")
@click.option("--requests-per-minute", type=click.IntRange(1), help="Requests in any minute.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Tokens, prompt and answer, in any minute.")
@click.option("--max-concurrent-requests", type=click.IntRange(1), help="Requests at once.")
@click.option(
    "--priority",
    type=click.Choice(["low", "normal", "high"]),
    default="normal",
    help="The highest priority that its requests may have. Default: normal.",
)
@click.option(
    "--budget",
    "budgets",
    type=BudgetSpec(),
    multiple=True,
    help="What it may use: 2M tokens in all, 500k/1d each day, 500k/rolling:24h, $5/30d (repeatable).",
)
@click.option("--expires", type=Duration(), help="How long it is valid: 24h, 30d. Default: until it is revoked.")
@click.option("--toml", "as_toml", is_flag=True, help="Print a block for cortex.toml instead of storing the key.")
@config_option
@json_option
def create(
    name: str,
    account: str | None,
    admin: bool,
    models: tuple[str, ...],
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_concurrent_requests: int | None,
    priority: Literal["low", "normal", "high"],
    budgets: tuple[Budget, ...],
    expires: int | None,
    as_toml: bool,
    config_path: Path,
    as_json: bool,
) -> None:
    import msgspec
    from cortex_core.entitlements import KeyEntry
    from cortex_gateway.identity.credentials import hash_text, new_key
    from cortex_gateway.identity.store import KeyExists, KeyRecord

    secret = new_key()
    entry = KeyEntry(
        key_id=name,
        account_id=account,
        hash=hash_text(secret),
        admin=admin,
        models=models or ("*",),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent_requests=max_concurrent_requests,
        priority=priority,
        budgets=budgets,
    )
    try:
        msgspec.convert(msgspec.to_builtins(entry), KeyEntry)
    except msgspec.ValidationError as exc:
        raise CliError(f"no name for a key or an account: letters, digits and ._:@/-, at most 64 ({exc})", 2) from exc
    if faults := list(entry.faults()):
        raise CliError("; ".join(faults), 2)
    if as_toml and expires is not None:
        raise CliError("a key in a file does not expire by itself; leave out --expires or --toml", 2)
    if not as_toml:
        now_ms = time.time_ns() // 1_000_000
        record = KeyRecord(entry, now_ms, expires_ms=None if expires is None else now_ms + expires * 1000)

        async def add(store: Store) -> None:
            await store.add_key(record)

        try:
            _with_store(config_path, add)
        except KeyExists:
            raise CliError(f"a key called `{name}` exists already (or did, and was revoked)") from None
    if as_json:
        click.echo(json.dumps({"key_id": name, "key": secret, "entry": msgspec.to_builtins(entry)}))
    elif as_toml:
        click.echo(_toml(entry), nl=False)
        click.echo(f"The key, which is shown only now: {secret}", err=True)
    else:
        click.echo(secret)
        if sys.stdout.isatty():
            click.echo("It is shown only now. Clients send it as their API key.", err=True)


@keys.command("list", help="Every key with its limits, and what it has used of its budgets.")
@config_option
@json_option
def list_keys(config_path: Path, as_json: bool) -> None:
    import msgspec

    async def read(store: Store) -> tuple[list[KeyRecord], list[BookedUse], Moment | None]:
        return await store.keys(), await store.usage(), await store.moment()

    section = _section(config_path)
    records, booked, moment = ([], [], None) if section.store == "memory" else _with_store(config_path, read)
    now_ms = time.time_ns() // 1_000_000
    found = [_described(entry, "configuration", "valid", booked, moment) for entry in section.keys]
    found += [_described(record.entry, "store", _state(record, now_ms), booked, moment) for record in records]
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("KEY", "ACCOUNT", "STATE", "FROM", "MODELS", "LIMITS", "USED"):
        table.add_column(title, overflow="fold")
    for each in found:
        table.add_row(
            each["key_id"] + (" (admin)" if each["admin"] else ""),
            each["account_id"],
            each["state"],
            each["from"],
            " ".join(each["models"]),
            " ".join(f"{limit}={value}" for limit, value in each["limits"].items()) or "-",
            " ".join(f"{use['budget']}={use['used']:g}/{use['cap']:g}" for use in each["budgets"]) or "-",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@keys.command(help="Revoke the key NAME. A running gateway refuses it within seconds; the name is not free again.")
@click.argument("name")
@config_option
def revoke(name: str, config_path: Path) -> None:
    async def end(store: Store) -> bool:
        return await store.revoke_key(name, time.time_ns() // 1_000_000)

    if any(entry.name == name for entry in _section(config_path).keys):
        raise CliError(f"`{name}` is a key of {config_path}: take it out there")
    if not _with_store(config_path, end):
        raise CliError(f"there is no valid key called `{name}`", EXIT_NOT_FOUND)
    click.echo(f"{name} revoked")


@keys.command("hash", help="Read a key from stdin and print its hash, as `entitlements.keys[].hash` wants it.")
def hash_key() -> None:
    from cortex_gateway.identity.credentials import hash_text

    secret = sys.stdin.readline().strip()
    if not secret:
        raise CliError("nothing to hash: write the key to stdin", 2)
    click.echo(hash_text(secret))


# ---------------------------------------------------------------------------------------------- the store


def _section(config_path: Path) -> EntitlementsSection:
    from cortex_core.config import ConfigError
    from cortex_core.gateway_config import load_gateway_config

    try:
        return load_gateway_config(config_path).entitlements
    except ConfigError as exc:
        raise CliError(f"configuration refused\n{exc}") from exc


def _with_store(config_path: Path, work: Callable[[Store], Awaitable[T]]) -> T:
    from cortex_gateway.identity.opening import store_of
    from cortex_gateway.identity.store import StoreError

    section = _section(config_path)
    if section.store == "memory":
        raise CliError(
            f'{config_path} keeps no keys: set `entitlements.store`, for example to "sqlite:cortex.db", or use --toml'
        )

    async def run() -> T:
        store = store_of(section)
        try:
            await store.open()
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except StoreError as exc:
        raise CliError(f"the store cannot be used: {exc}") from exc


# ---------------------------------------------------------------------------------------------- words


def _state(record: KeyRecord, now_ms: int) -> str:
    if record.revoked_ms is not None:
        return "revoked"
    return "valid" if record.is_valid(now_ms) else "expired"


def _described(
    entry: KeyEntry, origin: str, state: str, booked: list[BookedUse], moment: Moment | None
) -> dict[str, Any]:
    from cortex_gateway.identity.estimate import NANO_USD, cap_of
    from cortex_gateway.identity.windows import Slots

    budgets = []
    for budget in entry.all_budgets:
        slots = Slots.of(budget.window)
        oldest = 0 if moment is None else slots.oldest(moment.of(slots))
        used = sum(
            use.amount for use in booked if (use.key_id, use.budget) == (entry.name, budget.name) and use.slot >= oldest
        )
        unit = 1 if budget.tokens is not None else NANO_USD
        budgets.append({"budget": budget.name, "used": used / unit, "cap": cap_of(budget) / unit})
    limits = {
        "requests_per_minute": entry.requests_per_minute,
        "tokens_per_minute": entry.tokens_per_minute,
        "max_concurrent_requests": entry.max_concurrent_requests,
    }
    return {
        "key_id": entry.name,
        "account_id": entry.account,
        "admin": entry.admin,
        "priority": entry.priority,
        "state": state,
        "from": origin,
        "models": entry.models,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "budgets": budgets,
    }


def _toml(entry: KeyEntry) -> str:
    import msgspec

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{name} = {value(inner)}" for name, inner in item.items()) + " }"
        if isinstance(item, list | tuple):
            return "[" + ", ".join(value(inner) for inner in item) + "]"
        return json.dumps(item)

    fields = {name: item for name, item in msgspec.to_builtins(entry).items() if item is not None}
    for budget in fields.get("budgets", ()):
        for unset in [name for name, item in budget.items() if item is None]:
            del budget[unset]
    return "[[entitlements.keys]]\n" + "".join(f"{name} = {value(item)}\n" for name, item in fields.items())
