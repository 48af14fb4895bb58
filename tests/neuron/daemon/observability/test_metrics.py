"""What a scrape of a neuron says: what was counted, and what merely is."""

from __future__ import annotations

from collections import Counter

from cortex_core.fleet import DeviceHealth
from cortex_core.http_access import REASONS
from neuron.daemon.hardware.monitor import HardwareReading
from neuron.daemon.memory.weight_cache import GIVE_UP_REASONS

from tests.neuron.daemon.lifecycle.harness import model
from tests.neuron.daemon.observability.harness import metrics_of, value


def test_a_neuron_without_models_has_all_that_is_no_models() -> None:
    metrics = metrics_of()
    assert value(metrics, "neuron_build_info", version="1.2.3", git_sha="abc", torch="unknown") == 1
    assert value(metrics, "neuron_weight_cache_budget_bytes") == 1000
    for reason in GIVE_UP_REASONS:
        assert value(metrics, "neuron_weight_cache_given_up_total", reason=reason) == 0


def test_a_model_is_in_one_state() -> None:
    metrics = metrics_of([model("loading")])
    states = ("fetching", "loading", "loaded", "recovering", "failed", "unloading")
    found = {state: value(metrics, "neuron_model_state", model="org/name", state=state) for state in states}
    assert found == {**dict.fromkeys(states, 0), "loading": 1}


def test_devices_are_told_by_their_index_and_the_host_without_one() -> None:
    reading = HardwareReading((DeviceHealth(index=1, vram_used_mb=5, vram_free_mb=7),), memory_free_mb=99)
    metrics = metrics_of(reading=reading)
    assert value(metrics, "neuron_device_vram_free_mb", device="1") == 7
    assert value(metrics, "neuron_device_vram_free_mb", device="0") is None
    assert value(metrics, "neuron_memory_free_mb") == 99


def test_what_is_described_has_a_name_of_ours_and_one_meaning() -> None:
    lines = metrics_of([model("failed")]).render().decode().splitlines()
    names = Counter(line.split()[2] for line in lines if line.startswith("# HELP"))
    assert max(names.values()) == 1 and all(name.startswith("neuron_") for name in names)


def test_refusals_at_the_door_are_there_before_the_first_one() -> None:
    """A rate of what has never been is nothing, where a rate of what is not there is unknown."""
    metrics = metrics_of()
    for reason in REASONS:
        assert value(metrics, "neuron_access_refused_total", reason=reason) == 0
    metrics.access_refused.labels("host").inc()
    assert value(metrics, "neuron_access_refused_total", reason="host") == 1
