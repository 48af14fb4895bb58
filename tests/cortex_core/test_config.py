"""Configuration errors name file, line and key; nothing is swallowed."""

from __future__ import annotations

import pytest
from cortex_core.config import ConfigError, parse_config
from cortex_core.gateway_config import GatewayConfig

GOOD = """\
models_config = "models.toml"

[gateway]
listen = "127.0.0.1:1"
metrics_listen = "127.0.0.1:2"

[eviction]
strategy = "lru"

[[neurons]]
name = "beast"
endpoint = "http://beast:13131"

[[neurons]]
name = "benjy"
endpoint = "http://benjy:13131"
"""


def parse(text: str, environ: dict[str, str] | None = None) -> GatewayConfig:
    return parse_config(GatewayConfig, text, name="cortex.toml", env_prefix="CORTEX_", environ=environ)


def fault(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, environ)
    return str(caught.value)


def test_a_good_file_is_read() -> None:
    config = parse(GOOD)
    assert config.gateway.listen == "127.0.0.1:1"
    assert [neuron.name for neuron in config.neurons] == ["beast", "benjy"]
    assert config.poll.interval_s == 10.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("strategy = ", "stratgy = "), "cortex.toml:8: unknown key `eviction.stratgy` (did you mean `strategy`?)"),
        (('"lru"', '"fifo"'), "cortex.toml:8: Invalid enum value 'fifo' (`eviction.strategy`)"),
        (('"http://benjy:13131"', "7"), "cortex.toml:16: Expected `str`, got `int` (`neurons[1].endpoint`)"),
        (
            ('"http://benjy', '"ftp://benjy'),
            "cortex.toml:16: Expected `str` matching regex '^https?://[^/]+' (`neurons[1].endpoint`)",
        ),
        (('endpoint = "http://beast:13131"\n', ""), "cortex.toml:10: missing key `neurons[0].endpoint`"),
        (("[eviction]", "[eviction"), "cortex.toml:7:10: not valid TOML"),
    ],
)
def test_a_fault_names_file_line_and_key(change: tuple[str, str], expected: str) -> None:
    assert change[0] in GOOD
    assert fault(GOOD.replace(*change, 1)).startswith(expected)


def test_every_unknown_key_is_named_at_once() -> None:
    text = fault(GOOD + "\n[[nodes]]\nvram_mb = 1\n[gateway2]\nx = 1\n")
    assert "cortex.toml:18: unknown key `nodes`" in text
    assert "cortex.toml:20: unknown key `gateway2`" in text


def test_environment_overrides_the_file_by_nested_names() -> None:
    environ = {
        "CORTEX_GATEWAY__LISTEN": "0.0.0.0:9",
        "CORTEX_POLL__INTERVAL_S": "0.5",
        "CORTEX_NEURONS__1__ENDPOINT": "http://other:1",
        "CORTEX_NEURONS__2__NAME": "third",
        "CORTEX_NEURONS__2__ENDPOINT": "http://third:1",
        "CORTEX_ENDPOINT": "http://is-not-a-key",
    }
    config = parse(GOOD, environ)
    assert config.gateway.listen == "0.0.0.0:9"
    assert config.poll.interval_s == 0.5
    assert [neuron.endpoint for neuron in config.neurons] == ["http://beast:13131", "http://other:1", "http://third:1"]


def test_an_environment_fault_names_the_variable() -> None:
    assert fault(GOOD, {"CORTEX_GATEWAY__LISTN": "x"}) == "CORTEX_GATEWAY__LISTN: unknown key `gateway.listn`"
    assert fault(GOOD, {"CORTEX_POLL__INTERVAL_S": "soon"}).startswith("CORTEX_POLL__INTERVAL_S: ")
    assert fault(GOOD, {"CORTEX_NEURONS__1__ENDPOINT": "x"}).startswith("CORTEX_NEURONS__1__ENDPOINT: ")
