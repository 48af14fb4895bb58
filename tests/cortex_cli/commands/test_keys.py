"""`cortex keys` on a real store, and a real gateway process that knows what it did."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cortex_core.config import parse_config
from cortex_core.entitlements import Budget, KeyEntry, Window
from cortex_core.gateway_config import GatewayConfig, load_gateway_config


def cortex(
    *arguments: str, stdin: str | None = None, cwd: Path, key: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
    if key is not None:
        environment["CORTEX_API_KEY"] = key
    return subprocess.run(
        [sys.executable, "-m", "cortex_cli", *arguments],
        input=stdin, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cortex.toml").write_text(
        'models_config = "models.toml"\n[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
        '[entitlements]\nrequire_auth = true\nstore = "sqlite:keys.db"\nkey_refresh_s = 0.05\n'
    )
    return tmp_path


def listed(folder: Path) -> dict[str, dict[str, object]]:
    done = cortex("keys", "list", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {each["key_id"]: each for each in json.loads(done.stdout)}


def test_a_key_is_shown_once_and_kept_as_a_hash(folder: Path) -> None:
    made = cortex(
        "keys", "create", "ci", "--account", "acme", "--model", "org/*", "--model", "fast",
        "--requests-per-minute", "60", "--tokens-per-minute", "5000", "--max-concurrent-requests", "4",
        "--priority", "low",
        "--budget", "2M", "--budget", "500k/rolling:24h", "--budget", "$5.5/30d", "--expires", "90d", cwd=folder,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert re.fullmatch(r"sk-cortex-[\w-]{43}", secret) and made.stdout == secret + "\n"
    assert all(secret.encode() not in file.read_bytes() for file in folder.iterdir())
    found = listed(folder)["ci"]
    assert (found["account_id"], found["state"], found["from"], found["admin"]) == ("acme", "valid", "store", False)
    assert (found["models"], found["priority"]) == (["org/*", "fast"], "low")
    assert found["limits"] == {"requests_per_minute": 60, "tokens_per_minute": 5000, "max_concurrent_requests": 4}
    assert found["budgets"] == [
        {"budget": "tokens/balance", "used": 0, "cap": 2_000_000},
        {"budget": "tokens/rolling/86400", "used": 0, "cap": 500_000},
        {"budget": "cost/fixed/2592000", "used": 0, "cap": 5.5},
    ]
    table = cortex("keys", "list", cwd=folder).stdout
    assert "requests_per_minute=60" in table and "tokens/balance=0/2e+06" in table and secret not in table


def test_names_are_unique_and_revoked_ones_stay(folder: Path) -> None:
    assert cortex("keys", "create", "ci", cwd=folder).returncode == 0
    assert "exists already" in cortex("keys", "create", "ci", cwd=folder).stderr
    assert cortex("keys", "revoke", "ci", cwd=folder).stdout == "ci revoked\n"
    assert cortex("keys", "revoke", "ci", cwd=folder).returncode == 4
    assert cortex("keys", "revoke", "nobody", cwd=folder).returncode == 4
    assert listed(folder)["ci"]["state"] == "revoked"
    assert cortex("keys", "create", "ci", cwd=folder).returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["bad name"],
        ["ok", "--account", "a\nb"],
        ["ok", "--budget", "lots"],
        ["ok", "--budget", "0"],
        ["ok", "--budget", "1.5"],
        ["ok", "--budget", "5/never"],
        ["ok", "--budget", "5", "--budget", "6"],
        ["ok", "--expires", "soon"],
        ["ok", "--requests-per-minute", "0"],
        ["ok", "--toml", "--expires", "1d"],
    ],
)
def test_what_makes_no_sense_is_a_usage_error_and_makes_no_key(folder: Path, arguments: list[str]) -> None:
    done = cortex("keys", "create", *arguments, cwd=folder)
    assert done.returncode == 2 and done.stderr and not done.stdout
    assert listed(folder) == {}


def test_without_a_store_the_way_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "cortex.toml").write_text("")
    done = cortex("keys", "create", "ci", cwd=tmp_path)
    assert done.returncode == 1 and "entitlements.store" in done.stderr
    assert cortex("keys", "list", "--json", cwd=tmp_path).stdout.strip() == "[]"


def test_a_block_for_the_file_and_the_hash_of_an_old_key(tmp_path: Path) -> None:
    (tmp_path / "cortex.toml").write_text('[entitlements]\nstore = "sqlite:keys.db"\n')
    made = cortex("keys", "create", "ci", "--toml", "--admin", "--budget", "1k/1d", "--budget", "$2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    secret = made.stderr.split()[-1]
    assert secret.startswith("sk-cortex-") and secret not in made.stdout
    config = parse_config(GatewayConfig, '[entitlements]\nstore = "sqlite:x"\n' + made.stdout, name="block")
    hashed = cortex("keys", "hash", stdin=secret + "\n", cwd=tmp_path).stdout.strip()
    assert config.entitlements.keys == (
        KeyEntry(
            key_id="ci",
            hash=hashed,
            admin=True,
            budgets=(Budget(tokens=1000, window=Window("fixed", 86_400)), Budget(cost_usd=2.0)),
        ),
    )
    with (tmp_path / "cortex.toml").open("a") as file:
        file.write(made.stdout)
    load_gateway_config(tmp_path / "cortex.toml")
    assert listed(tmp_path)["ci"]["from"] == "configuration"
    assert "take it out there" in cortex("keys", "revoke", "ci", cwd=tmp_path).stderr


# ---------------------------------------------------------------------------------------------- with a gateway


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "cortex_cli", "serve"], cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (match := re.search(r"cortex listening on (http://\S+)", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)  # another process's log has no event
        yield match[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def status_of(url: str, key: str) -> int:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        return connection.getresponse().status
    finally:
        connection.close()


def eventually(url: str, key: str, status: int) -> None:
    deadline = time.monotonic() + 60
    while (found := status_of(url, key)) != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_running_gateway_follows_and_the_command_line_sends_its_key(folder: Path) -> None:
    with serving(folder) as url:
        assert status_of(url, "nothing") == 401
        secret = cortex("keys", "create", "ci", cwd=folder).stdout.strip()
        eventually(url, secret, 200)
        refused = cortex("models", "-e", url, cwd=folder)
        assert refused.returncode == 1 and "API key" in refused.stderr
        assert cortex("models", "--json", "-e", url, cwd=folder, key=secret).stdout.strip() == "[]"
        assert cortex("keys", "revoke", "ci", cwd=folder).returncode == 0
        eventually(url, secret, 401)
    assert secret not in (folder / "log").read_text()


def test_a_gateway_that_cannot_reach_its_keys_does_not_begin(folder: Path) -> None:
    (folder / "keys.db").write_text("this is no database, " * 100)
    done = cortex("serve", cwd=folder)
    assert done.returncode == 1 and "keys and budgets cannot be reached" in done.stdout + done.stderr
