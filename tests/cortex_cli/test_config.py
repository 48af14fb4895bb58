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
