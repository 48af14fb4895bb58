"""`cortex.toml`: what contradicts itself is refused, and where relative paths lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cortex_core.config import ConfigError, parse_config
from cortex_core.gateway_config import GatewayConfig, load_gateway_config, parse_gateway_config

GOOD = """\
models_config = "models.toml"

[gateway]
listen = "127.0.0.1:1"

[[neurons]]
name = "beast"
endpoint = "http://beast:13131"

[[neurons]]
name = "benjy"
endpoint = "http://benjy:13131"
"""


def test_the_models_file_is_relative_to_the_configuration_not_to_the_working_directory(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(GOOD)
    assert load_gateway_config(path, environ={}).models_config == str(tmp_path / "models.toml")


def test_a_missing_file_and_double_names_and_bad_listeners_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_gateway_config(tmp_path / "none.toml", environ={})
    path = tmp_path / "cortex.toml"
    path.write_text(GOOD.replace("benjy", "beast").replace("127.0.0.1:1", "nowhere"))
    with pytest.raises(ConfigError) as caught:
        load_gateway_config(path, environ={})
    assert "`beast` is used twice" in str(caught.value)
    assert "`nowhere` is not host:port" in str(caught.value)


OPENAI = '[[neurons]]\nname = "n"\nendpoint = "http://h"\nkind = "openai"\n'
NEURON = '[[neurons]]\nname = "n"\nendpoint = "http://h"\n'


def faults(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_gateway_config(text, "/etc/cortex/cortex.toml", environ={})
    return str(caught.value)


@pytest.mark.parametrize(
    "line", ['api_key = "env:KEY"', 'headers = {X-A = "env:A"}', "extensions = false", 'forward_headers = ["x-a"]']
)
def test_what_only_other_servers_have_is_refused_of_a_neuron(line: str) -> None:
    assert "`n` is a neuron: api_key, headers, extensions and forward_headers are for kind" in faults(NEURON + line)
    assert parse_gateway_config(OPENAI + line, None, environ={}).neurons[0].name == "n"


def test_the_secret_of_the_fleet_goes_to_neurons_alone() -> None:
    line = 'secret = "env:SECRET"'
    assert "the secret of the fleet does not go there" in faults(OPENAI + line)
    assert parse_gateway_config(NEURON + line, None, environ={}).neurons[0].secret == "env:SECRET"


@pytest.mark.parametrize("key", ["listen", "metrics_listen"])
@pytest.mark.parametrize("value", ["nowhere", ":80", "host:", "host:http", "host:65536"])
def test_a_listener_is_a_host_and_a_port(key: str, value: str) -> None:
    assert f"gateway.{key}: `{value}` is not host:port" in faults(f'[gateway]\n{key} = "{value}"\n')


def test_every_contradiction_is_said_at_once() -> None:
    said = faults('[gateway]\nlisten = "nowhere"\n' + NEURON + "extensions = false\n" + NEURON)
    assert "is not host:port" in said and "is a neuron" in said and "used twice" in said


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(
        '[gateway]\nsecret = "file:fleet"\n[entitlements]\nstore = "sqlite:keys.db"\n'
        + OPENAI
        + 'api_key = "file:key"\nheaders = {X-A = "file:/a", X-B = "env:B"}\n'
    )
    config = load_gateway_config(path, environ={})
    assert config.gateway.secret == f"file:{tmp_path}/fleet"
    assert config.entitlements.store == f"sqlite:{tmp_path}/keys.db"
    assert config.neurons[0].api_key == f"file:{tmp_path}/key"
    assert config.neurons[0].headers == {"X-A": "file:/a", "X-B": "env:B"}


def test_without_a_file_the_environment_is_the_configuration() -> None:
    config = load_gateway_config(
        None, environ={"CORTEX_NEURONS__0__NAME": "n", "CORTEX_NEURONS__0__ENDPOINT": "http://h"}
    )
    assert [neuron.endpoint for neuron in config.neurons] == ["http://h"]


@pytest.mark.parametrize(
    "name",
    [
        "Authorization", "x-api-key", "cookie", "host", "content-length", "transfer-encoding", "connection", "te",
        "proxy-authorization", "X-Cortex-Hop", "x-helexa-account-id", "x-request-id", "accept-encoding", "upgrade",
    ],
)  # fmt: skip
def test_H12_what_may_never_go_on_is_refused_in_the_configuration(name: str, tmp_path: Any) -> None:
    file = tmp_path / "cortex.toml"
    entry = f'[[neurons]]\nname = "n"\nendpoint = "http://h"\nkind = "openai"\nforward_headers = ["{name}"]\n'
    file.write_text(entry)
    with pytest.raises(ConfigError, match=f"forward_headers: `{name}` may not go on"):
        load_gateway_config(file, environ={})


def test_H12_no_header_of_a_neuron_is_configured_and_no_name_is_made_up(tmp_path: Any) -> None:
    file = tmp_path / "cortex.toml"
    file.write_text('[[neurons]]\nname = "n"\nendpoint = "http://h"\nforward_headers = ["accept"]\n')
    with pytest.raises(ConfigError, match="forward_headers are for kind `openai`"):
        load_gateway_config(file, environ={})
    with pytest.raises(ConfigError):
        parse_config(
            GatewayConfig, 'neurons = [{name = "n", endpoint = "http://h", forward_headers = ["a b"]}]', name=""
        )
