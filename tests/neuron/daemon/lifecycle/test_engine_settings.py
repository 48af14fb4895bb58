"""What a load order says goes before what the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import EngineSection, NeuronConfig
from neuron.daemon.lifecycle.engine_settings import engine_config
from neuron.protocol import EngineConfig


def settled(engine: EngineSection, **order: Any) -> EngineConfig:
    config = NeuronConfig(engine=engine)
    spec = ModelSpec("org/model", **order)
    return engine_config(config, spec, model_id="org/model", path=Path("/m"), devices=(), free_mb=dict)


@pytest.mark.parametrize(
    ("field", "configured", "ordered"),
    [("dtype", "bfloat16", "float32"), ("deterministic", True, False), ("max_model_len", 4096, 512)],
)
def test_an_order_goes_before_the_configuration(field: str, configured: object, ordered: object) -> None:
    engine = EngineSection(**{field: configured})  # type: ignore[arg-type]
    assert getattr(settled(engine), field) == configured
    assert getattr(settled(engine, **{field: ordered}), field) == ordered


def test_the_size_of_the_cache_is_told_in_bytes() -> None:
    assert settled(EngineSection()).kv_cache_bytes is None
    assert settled(EngineSection(kv_cache_mb=3), kv_cache_mb=2).kv_cache_bytes == 2 * 2**20
