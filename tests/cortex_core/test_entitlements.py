"""Keys in the configuration: what is refused says which key and why, and never holds a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.config import ConfigError
from cortex_core.entitlements import Budget, KeyEntry, Window
from cortex_core.gateway_config import load_gateway_config

HASH = "sha256:" + "0" * 64
SECRET = "hunter2-hunter2"


def faults(tmp_path: Path, text: str, **environ: str) -> str:
    path = tmp_path / "cortex.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_gateway_config(path, environ=environ)
    assert SECRET not in str(refused.value)
    return str(refused.value)


def entry(*lines: str) -> str:
    return "[[entitlements.keys]]\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (entry(f'hash = "{HASH}"'), "needs a `key_id` or an `account_id`"),
        (entry('key_id = "ci"'), "keys[0] (`ci`): needs either `hash` or `key`"),
        (entry('key_id = "ci"', f'hash = "{HASH}"', f'key = "{SECRET}"'), "needs either `hash` or `key`"),
        (entry('key_id = "ci"', f'hash = "sha256:{SECRET}"'), "entitlements.keys[0].hash"),
        (entry('key_id = "a\\n"', f'hash = "{HASH}"'), "entitlements.keys[0].key_id"),
        (entry('key_id = "a b"', f'hash = "{HASH}"'), "entitlements.keys[0].key_id"),
        (entry('key_id = "ci"', f'key = "{SECRET}"', "hard_cap = 5"), "set `entitlements.store`"),
        (entry('key_id = "ci"', f'hash = "{HASH}"') + entry('account_id = "ci"', f'key = "{SECRET}"'), "used twice"),
        (entry('key_id = "a"', f'key = "{SECRET}"') + entry('key_id = "b"', f'key = "{SECRET}"'), "same secret"),
        (
            '[entitlements]\nstore = "sqlite:x"\n'
            + entry('key_id = "ci"', f'hash = "{HASH}"', "budgets = [{ tokens = 1 }, { tokens = 2 }]"),
            "two budgets are the same: tokens/balance",
        ),
        (
            '[entitlements]\nstore = "sqlite:x"\n'
            + entry('key_id = "ci"', f'hash = "{HASH}"', "budgets = [{ tokens = 1, cost_usd = 2.0 }]"),
            "either `tokens` or `cost_usd`",
        ),
        (f'[entitlements]\nstore = "mysql://{SECRET}@db/x"\n', "entitlements.store"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    assert named in faults(tmp_path, text)


def test_a_variable_that_cannot_be_read_is_named_and_not_shown(tmp_path: Path) -> None:
    broken = f'[{{key_id = "ci", key = "{SECRET}"'
    assert "CORTEX_ENTITLEMENTS__KEYS" in faults(tmp_path, "", CORTEX_ENTITLEMENTS__KEYS=broken)
    wrong = f'[{{key_id = "ci", kye = "{SECRET}"}}]'
    assert "CORTEX_ENTITLEMENTS__KEYS" in faults(tmp_path, "", CORTEX_ENTITLEMENTS__KEYS=wrong)


def test_files_of_the_reference_system_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(
        '[entitlements]\nrequire_auth = true\nstore = "sqlite:keys.db"\n'
        + entry(
            f'key = "{SECRET}"', 'account_id = "acme"', "hard_cap = 500", 'window = { kind = "rolling", seconds = 60 }'
        )
    )
    section = load_gateway_config(path, environ={}).entitlements
    (key,) = section.keys
    assert section.require_auth and section.store == f"sqlite:{tmp_path}/keys.db"
    assert (key.name, key.account) == ("acme", "acme")
    assert key.all_budgets == (Budget(tokens=500, window=Window("rolling", 60)),)


def test_use_is_booked_by_unit_and_window_and_not_by_cap() -> None:
    assert Budget(tokens=5).name == Budget(tokens=9).name == "tokens/balance"
    assert Budget(cost_usd=5.0, window=Window("fixed", 60)).name == "cost/fixed/60"


def test_a_secret_and_its_hash_are_the_same_key() -> None:
    plain = KeyEntry(key_id="ci", key="abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert plain.digest == KeyEntry(key_id="ci", hash=f"sha256:{digest}").digest
