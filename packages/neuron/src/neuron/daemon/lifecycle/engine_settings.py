"""Settings that a model is served with, from the configuration and its load order: the engine's and the queue's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cortex_core.fleet import DeviceInfo, ModelSpec

from neuron.checkpoint.preflight import world_size_of
from neuron.daemon.admission.admission import AdmissionLimits
from neuron.daemon.common.config import AdmissionConfig, NeuronConfig
from neuron.daemon.lifecycle.parallelism import choose_devices, choose_shares
from neuron.protocol import EngineConfig


def engine_config(
    config: NeuronConfig,
    spec: ModelSpec,
    *,
    model_id: str,
    path: Path,
    devices: tuple[DeviceInfo, ...],
    free_mb: Callable[[], Mapping[int, int]],
) -> EngineConfig:
    """What the order says goes before what the configuration says. devices: those of the host; free_mb: of each."""
    engine = config.engine
    kv_cache_mb = spec.kv_cache_mb or engine.kv_cache_mb
    chosen = choose_devices(spec, devices)
    return EngineConfig(
        model_id=model_id,
        path=str(path),
        devices=chosen,
        tensor_parallel_size=world_size_of(spec),
        shares=choose_shares(spec, chosen, free_mb()),
        collective_timeout_s=engine.collective_timeout_s,
        dtype=spec.dtype or engine.dtype,
        max_model_len=spec.max_model_len or engine.max_model_len,
        kv_cache_bytes=None if kv_cache_mb is None else kv_cache_mb * 2**20,
        kv_cache_tokens=engine.kv_cache_tokens,
        page_size=engine.page_size,
        max_step_tokens=engine.max_step_tokens,
        max_running=engine.max_running,
        prefix_cache=config.tables.prefix_cache.enabled,
        num_threads=engine.num_threads,
        deterministic=engine.deterministic if spec.deterministic is None else spec.deterministic,
        all_reduce=engine.all_reduce,
        overlap=engine.overlap,
        cuda_graphs=engine.cuda_graphs,
        debug=spec.debug or {},
    )


def admission_limits(configured: AdmissionConfig) -> AdmissionLimits:
    return AdmissionLimits(
        max_in_flight=configured.max_in_flight,
        max_queue_depth=configured.max_queue_depth,
        max_wait_s=configured.max_wait_secs,
        kv_max_wait_s=configured.kv_max_wait_secs,
        max_per_principal=configured.max_per_principal,
        anon_max_in_flight=configured.anon_max_in_flight,
        anon_max_pending=configured.anon_max_pending,
    )
