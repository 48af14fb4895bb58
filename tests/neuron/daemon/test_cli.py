from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from neuron.daemon import server
from neuron.daemon.cli import cli
from neuron.daemon.common.config import NeuronConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[NeuronConfig]:
    """Configurations that `serve` was called with, instead of serving."""
    seen: list[NeuronConfig] = []

    def serve(config: NeuronConfig, **_: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    return seen


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "neuron.toml"
    path.write_text('port = 4000\n[[default_models]]\nmodel_id = "a/b"\n')
    return path


@pytest.mark.parametrize("command", [["serve"], []])
def test_flags_override_the_file(served: list[NeuronConfig], config_file: Path, command: list[str]) -> None:
    arguments = [*command, "--config", str(config_file), "-p", "0", "--host", "127.0.0.1", "--model", "c/d"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    (config,) = served
    assert (config.host, config.port) == ("127.0.0.1", 0)
    assert [spec.model_id for spec in config.default_models] == ["a/b", "c/d"]


def test_without_a_file_the_defaults_serve(
    served: list[NeuronConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli, []).exit_code == 0
    assert served == [NeuronConfig()]


def test_a_named_file_must_exist_and_be_right(served: list[NeuronConfig], tmp_path: Path) -> None:
    missing = CliRunner().invoke(cli, ["serve", "-c", str(tmp_path / "gone.toml")])
    assert missing.exit_code == 1 and "no such file" in missing.output
    wrong = tmp_path / "neuron.toml"
    wrong.write_text("port = 1\nprot = 2\n")
    refused = CliRunner().invoke(cli, ["-c", str(wrong)])
    assert refused.exit_code == 1 and "neuron.toml:2" in refused.output and "did you mean `port`" in refused.output
    assert served == []


def test_discover_says_what_the_route_says() -> None:
    found = json.loads(CliRunner().invoke(cli, ["discover", "--json"]).stdout)
    assert found["harnesses"] == ["candle"] and found["cpu_count"] >= 1
    text = CliRunner().invoke(cli, ["discover"]).stdout
    assert f"{found['cpu_count']} cores" in text and found["hostname"] in text


def test_version_names_package_and_torch() -> None:
    output = CliRunner().invoke(cli, ["--version"]).output
    assert output.startswith(f"neuron {metadata.version('helexa-neuron')} (")
    assert f"torch {metadata.version('torch')}" in output


@pytest.mark.parametrize("module", ["neuron", "neuron.cli"])
def test_the_command_line_is_found_under_its_old_name_too(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("neuron ")


def test_an_engine_process_is_started_under_its_old_name_too() -> None:
    done = subprocess.run([sys.executable, "-m", "neuron.worker", "--help"], capture_output=True, text=True, check=True)
    assert "--socket" in done.stdout
