"""The configuration as one value: read and checked as a start does it, and held in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.config import ConfigError
from cortex_core.gateway_config import GatewayConfig, GatewaySection, NeuronEntry
from cortex_gateway.configuration.current import (
    Configuration,
    Current,
    Texts,
    read_configuration,
    texts_now,
    with_secrets,
)

CONFIG = 'models_config = "models.toml"\n[gateway]\nlisten = "127.0.0.1:1"\n'
CATALOGUE = '[[models]]\nid = "org/name"\nsource = "hf"\n'


def files(folder: Path, config: str = CONFIG, catalogue: str | None = CATALOGUE) -> Path:
    (folder / "cortex.toml").write_text(config)
    if catalogue is not None:
        (folder / "models.toml").write_text(catalogue)
    return folder / "cortex.toml"


def test_both_files_are_read_and_kept_as_they_were(tmp_path: Path) -> None:
    value = read_configuration(files(tmp_path))
    assert value.config.gateway.listen == "127.0.0.1:1"
    assert [profile.id for profile in value.catalogue.models] == ["org/name"]
    assert value.canonical == {"hf:org/name": "org/name"}
    assert value.has_catalogue_file and value.texts == Texts(CONFIG, CATALOGUE)
    assert texts_now(tmp_path / "cortex.toml", value.config) == value.texts
    assert "org/name" not in repr(value.texts), "they may hold keys in clear"


def test_a_start_takes_a_missing_catalogue_for_none_and_a_reload_for_a_fault(tmp_path: Path) -> None:
    before = read_configuration(files(tmp_path))
    (tmp_path / "models.toml").unlink()
    assert read_configuration(tmp_path / "cortex.toml").catalogue == Catalogue()
    with pytest.raises(ConfigError, match="no such file; to have no catalogue, make it an empty one"):
        read_configuration(tmp_path / "cortex.toml", before)
    (tmp_path / "models.toml").touch()
    assert read_configuration(tmp_path / "cortex.toml", before).catalogue == Catalogue()


def test_faults_of_all_that_could_be_looked_at_are_told_together(tmp_path: Path) -> None:
    secret = '[[neurons]]\nname = "n"\nendpoint = "http://h"\nsecret = "env:NO_SUCH_VARIABLE"\n'
    path = files(tmp_path, CONFIG + secret, '[[models]]\nidd = "x"\n')
    with pytest.raises(ConfigError) as caught:
        read_configuration(path)
    said = str(caught.value)
    assert "models.toml" in said and "NO_SUCH_VARIABLE" in said


def test_one_secret_that_many_lack_is_missed_once() -> None:
    neurons = tuple(NeuronEntry(name, "http://h") for name in "abc")
    config = GatewayConfig(gateway=GatewaySection(secret="env:SECRET"), neurons=neurons)
    with pytest.raises(ConfigError) as caught:
        with_secrets(config, Catalogue(), environ={})
    assert len(caught.value.faults) == 1
    held = with_secrets(config, Catalogue(), environ={"SECRET": "0123456789abcdef0123456789abcdef"})
    assert set(held.secret_headers) == {"a", "b", "c"} and "0123456789abcdef" not in repr(held)


def test_sections_are_what_the_files_name_and_what_is_not_at_its_default() -> None:
    by_environment = GatewayConfig(neurons=(NeuronEntry("n", "http://h"),))
    value = Configuration(by_environment, Catalogue(), texts=Texts("[gateway]\n", "[aliases]\n"))
    assert value.sections == {"gateway", "aliases", "neurons"}
    assert Configuration(GatewayConfig(), Catalogue(), texts=Texts("[gateway", "")).sections == frozenset()


def test_a_new_value_is_seen_whole_and_the_first_one_is_remembered() -> None:
    first = Configuration(GatewayConfig(), Catalogue())
    current = Current(first)
    second = Configuration(GatewayConfig(models_config="/other"), Catalogue(models=(ModelProfile(id="m"),)))
    current.value = second
    assert current.started_with is first and current.value is second
    assert (current.config, current.catalogue, current.policy) == (second.config, second.catalogue, second.policy)
