"""Engines with a real model, small enough for tests."""

from __future__ import annotations

from neuron.engine.loading.loading import load_engine
from neuron.engine.step.engine import Engine
from neuron.protocol import EngineConfig


def load(checkpoint, **fields) -> Engine:
    fields = {"num_threads": 1, "kv_cache_tokens": 2048} | fields
    return load_engine(EngineConfig(model_id="tiny", path=str(checkpoint), **fields))[0]
