"""Sources that a test's registry serves."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from cortex_core.fleet import LoadProgress, ModelSpec
from neuron.daemon.common.config import EngineTables, SourceConfig
from neuron.daemon.hub.sources import Sources

from tests.neuron.daemon.hub.mock_registry import MockRegistry

REPO = "acme/model"
SPEC = ModelSpec(f"mock:{REPO}")
WEIGHTS = {"model-1.safetensors": b"1" * 50_000, "model-2.safetensors": b"2" * 30_000}
FILES = {
    "README.md": b"unwanted",
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
    **WEIGHTS,
    "consolidated.safetensors": b"unwanted",
    "onnx/model.onnx": b"unwanted",
}


def sources(registry: MockRegistry, cache: Path, environ: dict[str, str] | None = None) -> Sources:
    source = SourceConfig(endpoint=registry.url, auth_env="MOCK_TOKEN", cache_dir=str(cache))
    return Sources(EngineTables(sources={"mock": source}), environ=environ or {})


def fetch(found: Sources, spec: ModelSpec = SPEC, progress: list[LoadProgress] | None = None) -> Path:
    seen = progress if progress is not None else []
    return found.fetch(spec, on_progress=seen.append, cancelled=threading.Event())
