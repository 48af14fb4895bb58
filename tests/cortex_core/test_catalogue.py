"""Feasibility, residency and aliases of the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.catalogue import (
    Catalogue,
    ModelProfile,
    is_feasible,
    load_catalogue,
    load_spec,
    may_displace,
)
from cortex_core.config import ConfigError
from cortex_core.fleet import DeviceInfo, DiscoveryResponse


def host(*sizes: int, memory_mb: int = 0) -> DiscoveryResponse:
    devices = tuple(DeviceInfo(index, f"card {index}", size) for index, size in enumerate(sizes))
    return DiscoveryResponse(devices=devices, memory_total_mb=memory_mb)


@pytest.mark.parametrize(
    ("profile", "discovery", "expected"),
    [
        (ModelProfile("m", min_devices=2, min_device_vram_mb=30_000), host(32_607, 32_607), True),
        (ModelProfile("m", min_devices=2, min_device_vram_mb=30_000), host(32_607), False),
        (ModelProfile("m", min_devices=2, min_device_vram_mb=30_000), host(32_607, 12_000), False),
        (ModelProfile("m", pinned_on=("other",)), host(32_607), False),
        (ModelProfile("m", pinned_on=("here",)), host(32_607), True),
        (ModelProfile("m"), host(1), True),
        (ModelProfile("m"), host(), True),
        (ModelProfile("m", min_devices=2), host(), False),
        (ModelProfile("m", vram_mb=16_000), host(memory_mb=8_000), False),
        (ModelProfile("m", vram_mb=16_000), host(memory_mb=64_000), True),
    ],
)
def test_feasibility(profile: ModelProfile, discovery: DiscoveryResponse, expected: bool) -> None:
    assert is_feasible(profile, "here", discovery) is expected


def test_residency_classes_in_both_directions() -> None:
    catalogue = Catalogue(
        models=(
            ModelProfile("pinned", pinned_on=("a",)),
            ModelProfile("pinned-low", pinned_on=("a",), residency_priority=5),
            ModelProfile("plain"),
        )
    )
    assert catalogue.residency("pinned") == 1000
    assert catalogue.residency("pinned-low") == 5
    assert catalogue.residency("unlisted") == 100
    assert may_displace(catalogue, "plain", "unlisted")
    assert may_displace(catalogue, "unlisted", "plain")
    assert not may_displace(catalogue, "plain", "pinned")
    assert may_displace(catalogue, "pinned", "plain")


def test_aliases_are_exact_then_wildcard_in_order_and_never_chained() -> None:
    catalogue = Catalogue(
        models=(ModelProfile("org/model"),),
        aliases={"fast": "org/small", "claude-*haiku*": "org/small", "claude-*": "fast", "org/*": "never"},
    )
    assert catalogue.resolve("fast") == "org/small"
    assert catalogue.resolve("claude-haiku-4-5") == "org/small"
    assert catalogue.resolve("claude-opus-5-5") == "fast"
    assert catalogue.resolve("org/model") == "org/model"
    assert catalogue.resolve("org/served", served={"org/served"}) == "org/served"
    assert catalogue.resolve("org/unknown") == "never"
    assert catalogue.resolve("unknown") == "unknown"


def test_a_load_asks_for_the_first_devices_that_are_large_enough() -> None:
    profile = ModelProfile("org/m", min_devices=2, min_device_vram_mb=20_000, source="mirror", quant="q6k")
    spec = load_spec(profile, host(12_000, 24_000, 24_000, 24_000))
    assert (spec.model_id, spec.devices, spec.tensor_parallel, spec.quant) == ("mirror:org/m", (1, 2), 2, "q6k")
    assert load_spec(ModelProfile("org/m"), host()).devices is None


def test_a_missing_file_is_empty_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert load_catalogue(tmp_path / "models.toml") == Catalogue()
    path = tmp_path / "models.toml"
    path.write_text('[[models]]\nid = "a"\npined_on = ["x"]\n')
    with pytest.raises(
        ConfigError, match=r"models.toml:3: unknown key `models\[0\].pined_on` \(did you mean `pinned_on`"
    ):
        load_catalogue(path)
    path.write_text('[[models]]\nid = "a"\n[[models]]\nid = "a"\n[aliases]\na = "b"\n')
    with pytest.raises(ConfigError, match="listed twice") as caught:
        load_catalogue(path)
    assert "would never apply" in str(caught.value)
