"""Metrics of a neuron that has what a test gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cortex_core.fleet import BuildInfo
from cortex_core.serving.connection_table import ConnectionTable
from neuron.daemon.hardware.monitor import HardwareReading
from neuron.daemon.memory.weight_cache import WeightCache
from neuron.daemon.observability.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families


def metrics_of(models: Sequence[Any] = (), reading: HardwareReading | None = None) -> Metrics:
    return Metrics(
        build=BuildInfo(package_version="1.2.3", git_sha="abc"),
        models=lambda: models,
        reading=lambda: reading or HardwareReading(),
        weights=WeightCache(1000, free_bytes=lambda: 10**9, headroom_bytes=0),
        connections=ConnectionTable(10, idle_s=1, head_s=1, clock=lambda: 0.0),
    )


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Of the sample with these labels in a scrape, None where there is none."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None
