from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.config import ConfigError
from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import NeuronConfig, load_neuron_config, without_effect

REFERENCE = """
port = 13131

[[harnesses]]
name = "candle"

[[default_models]]
model_id = "Qwen/Qwen3.6-27B"
harness = "candle"
quant = "q6k"
tensor_parallel = 2
devices = [0, 1]

[harness.candle]
hf_cache = "/var/lib/neuron/hub"
default_source = "helexa"

[harness.candle.sources.helexa]
endpoint = "https://registry.example"
auth_env = "HELEXA_TOKEN"

[harness.candle.prefix_cache]
enabled = true
budget_mb = 2048

[harness.candle.context_limit]
target_prefill_latency_secs = 120.0

[harness.candle.admission]
max_in_flight = 8
max_queue_depth = 24
max_wait_secs = 60
max_per_principal = 2

[harness.candle.image]
max_dim = 768
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "neuron.toml"
    path.write_text(REFERENCE)
    return path


def test_a_file_of_the_reference_loads_and_what_has_no_effect_is_named(file: Path) -> None:
    config = load_neuron_config(file, environ={})
    assert config.default_models == (ModelSpec("Qwen/Qwen3.6-27B", quant="q6k", tensor_parallel=2, devices=(0, 1)),)
    assert config.harness.candle.admission.max_in_flight == 8 and config.has_engine
    assert without_effect(config) == [
        "harness.candle.prefix_cache.budget_mb",
        "harness.candle.context_limit.target_prefill_latency_secs",
        "harness.candle.image.max_dim",
    ]
    assert without_effect(NeuronConfig()) == []


def test_the_environment_overrides(file: Path) -> None:
    environ = {
        "NEURON_PORT": "14000",
        "NEURON_ENGINE__DTYPE": "float32",
        "NEURON_HARNESS__CANDLE__ADMISSION__MAX_IN_FLIGHT": "3",
        "NEURON_PREFILL_CHUNK_TOKENS": "512",  # a variable of the reference that is no key
    }
    config = load_neuron_config(file, environ=environ)
    assert config.port == 14000 and config.engine.dtype == "float32"
    assert config.harness.candle.admission.max_in_flight == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("port = 13131", "port = 131310"), "port"),
        (("max_dim", "max_dimm"), "max_dim"),
        (("https://registry.example", "registry.example"), "`harness.candle.sources`"),
        (('default_source = "helexa"', 'default_source = "nobody"'), "no source `nobody`"),
    ],
)
def test_faults_name_file_and_key(file: Path, change: tuple[str, str], words: str) -> None:
    file.write_text(REFERENCE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_neuron_config(file, environ={})
    assert str(file) in str(caught.value) and words in str(caught.value)


def test_without_our_harness_there_is_no_engine(file: Path) -> None:
    file.write_text('[[harnesses]]\nname = "other"\n')
    config = load_neuron_config(file, environ={})
    assert not config.has_engine and without_effect(config) == ["harnesses: other"]
