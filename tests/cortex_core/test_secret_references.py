"""Secrets are named in configurations, and read from where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.config import ConfigError
from cortex_core.gateway_config import load_gateway_config
from cortex_core.secret_references import absolute, resolve_secret

SERVER = """
[[neurons]]
name = "hosted"
endpoint = "https://example.org/v1"
kind = "openai"
"""


def test_a_secret_is_read_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("  sk-1\n")
    assert resolve_secret("env:KEY", {"KEY": "sk-2\n"}) == "sk-2"
    assert resolve_secret(absolute("file:key", tmp_path), {}) == "sk-1"
    assert absolute("env:KEY", tmp_path) == "env:KEY"


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("env:NONE", "no variable NONE"),
        ("file:/nonexistent/key", "/nonexistent/key cannot be read: No such file"),
        ("env:EMPTY", "EMPTY holds no single line"),
        ("env:LINES", "LINES holds no single line"),
        ("env:UMLAUT", "UMLAUT holds no single line"),
    ],
)
def test_what_is_wrong_is_said_without_the_secret(reference: str, fault: str) -> None:
    environ = {"EMPTY": " \n", "LINES": "sk-secret\nx-injected: 1", "UMLAUT": "sk-secret-\u00fc"}
    with pytest.raises(ValueError, match=fault) as caught:
        resolve_secret(reference, environ)
    assert "sk-secret" not in str(caught.value)


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "cortex.toml"
    config.write_text(SERVER + 'api_key = "file:keys/hosted"\nheaders = { "x-org" = "env:ORG" }\n')
    (neuron,) = load_gateway_config(config, environ={}).neurons
    assert neuron.api_key == f"file:{tmp_path}/keys/hosted"
    assert neuron.headers == {"x-org": "env:ORG"}


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('api_key = "sk-secret"', "api_key"),
        ('headers = { "x org" = "env:ORG" }', "headers"),
        ('headers = { "x-org" = "sk-secret" }', "headers"),
        ('kind = "neuron"\napi_key = "env:KEY"', "is a neuron: api_key"),
    ],
)
def test_a_secret_in_the_configuration_itself_is_refused_and_not_repeated(
    lines: str, fault: str, tmp_path: Path
) -> None:
    config = tmp_path / "cortex.toml"
    config.write_text(SERVER.replace('kind = "openai"\n', "" if "kind" in lines else 'kind = "openai"\n') + lines)
    with pytest.raises(ConfigError, match=fault) as caught:
        load_gateway_config(config, environ={})
    assert "sk-secret" not in str(caught.value)


def test_a_secret_in_a_variable_that_wants_a_reference_is_not_repeated() -> None:
    environ = {
        "CORTEX_NEURONS__0__NAME": "hosted",
        "CORTEX_NEURONS__0__ENDPOINT": "https://example.org",
        "CORTEX_NEURONS__0__KIND": "openai",
        "CORTEX_NEURONS__0__API_KEY": "sk-secret",
    }
    with pytest.raises(ConfigError, match="CORTEX_NEURONS__0__API_KEY") as caught:
        load_gateway_config(None, environ=environ)
    assert "sk-secret" not in str(caught.value)
    (neuron,) = load_gateway_config(None, environ={**environ, "CORTEX_NEURONS__0__API_KEY": "env:KEY"}).neurons
    assert neuron.api_key == "env:KEY"
