"""`cortex config schema` says what `cortex config check` accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cortex_cli.commands.config import config


def schema_of(kind: str) -> dict[str, Any]:
    done = CliRunner().invoke(config, ["schema", kind])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert isinstance(document, dict)
    return document


def resolved(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = document["$defs"][node["$ref"].rpartition("/")[2]]
    return node


@pytest.mark.parametrize(
    ("kind", "section", "key"),
    [("cortex", "gateway", "listen"), ("cortex", "poll", "interval_s"), ("neuron", "engine", "max_step_tokens")],
)
def test_sections_and_their_keys_are_described(kind: str, section: str, key: str) -> None:
    document = schema_of(kind)
    top = resolved(document, document)
    assert key in resolved(document, top["properties"][section])["properties"]


def test_unknown_keys_are_no_part_of_it() -> None:
    for kind in ("cortex", "neuron"):
        document = schema_of(kind)
        assert resolved(document, document)["additionalProperties"] is False


def test_what_the_schema_requires_the_check_requires(tmp_path: Path) -> None:
    document = schema_of("models")
    profile = document["$defs"]["ModelProfile"]
    assert "id" in profile["required"]
    path = tmp_path / "models.toml"
    path.write_text('[[models]]\nharness = "candle"\n', encoding="utf-8")
    done = CliRunner().invoke(config, ["check", str(path)])
    assert done.exit_code == 1
    assert "missing key" in done.output and "id" in done.output


GATEWAY_WITH_SECRETS = """
[[neurons]]
name = "one"
endpoint = "http://127.0.0.1:9"
kind = "openai"
api_key = "env:A_KEY_FOR_ONE"
headers = { x-team = "file:team" }
"""


def test_secrets_are_looked_at_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(GATEWAY_WITH_SECRETS, encoding="utf-8")
    monkeypatch.delenv("A_KEY_FOR_ONE", raising=False)
    assert CliRunner().invoke(config, ["check", str(path)]).exit_code == 0

    done = CliRunner().invoke(config, ["check", "--secrets", "--json", str(path)])
    assert done.exit_code == 1
    faults = json.loads(done.output)["faults"]
    assert len(faults) == 2
    assert all(fault.startswith(f"{path}: neurons.one: ") for fault in faults)
    assert any("A_KEY_FOR_ONE" in fault for fault in faults)
    assert any(str(tmp_path / "team") in fault for fault in faults)

    monkeypatch.setenv("A_KEY_FOR_ONE", "open sesame")
    (tmp_path / "team").write_text("blue\n", encoding="utf-8")
    done = CliRunner().invoke(config, ["check", "--secrets", str(path)])
    assert done.exit_code == 0, done.output
    assert "sesame" not in done.output


def test_O13_secrets_of_a_fleet_are_looked_at_in_either_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEET", raising=False)
    gateway, neuron = tmp_path / "cortex.toml", tmp_path / "neuron.toml"
    entry = '[[neurons]]\nname = "one"\nendpoint = "http://127.0.0.1:9"\n'
    gateway.write_text(f'[gateway]\nsecret = ["env:FLEET", "file:next"]\n{entry}')
    neuron.write_text('[server]\nsecret = ["env:FLEET", "file:next"]\n')
    for path, key in ((gateway, "gateway.secret"), (neuron, "server.secret")):
        assert CliRunner().invoke(config, ["check", str(path)]).exit_code == 0
        done = CliRunner().invoke(config, ["check", "--secrets", "--json", str(path)])
        faults = json.loads(done.output)["faults"]
        assert len(faults) == 2 and all(f"{path}: {key}: " in fault for fault in faults)
    monkeypatch.setenv("FLEET", "knock-sesame")
    (tmp_path / "next").write_text("knock-barley\n", encoding="utf-8")
    done = CliRunner().invoke(config, ["check", "--secrets", str(gateway), str(neuron)])
    assert done.exit_code == 0, done.output
    assert "knock-" not in done.output
