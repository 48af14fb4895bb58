"""Loading and coming back: a checkpoint of the model's shapes, written to disk, read from the page cache and from the
daemon's copy in memory, against the rate of a large copy from pinned memory."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loading import pinned_rate
from neuron.daemon.memory.weight_cache import WeightCache
from neuron.engine.models.registry import build_model
from neuron.engine.weights.loader import load_weights
from safetensors.torch import save_file

Row = dict[str, Any]
_SHARD_BYTES = 2 * 2**30


def write_checkpoint(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> int:
    """Shards of some 2 GiB and their index; the bytes of all."""
    model = build_model(config, device=torch.device("cpu"), dtype=dtype)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    num_bytes = shard_bytes = 0

    def finish() -> None:
        nonlocal shard_bytes
        name = f"model-{len(set(weight_map.values())) + 1}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        shard_bytes = 0

    for prefix, module, part in model.checkpoint_modules():
        for weight_slice in module.weight_slices(part):
            tensor = torch.full(weight_slice.checkpoint_shape, 0.001 * (len(weight_map) + len(shard)), dtype=dtype)
            shard[f"{prefix}.{weight_slice.suffix}"] = tensor
            num_bytes += tensor.nbytes
            shard_bytes += tensor.nbytes
            if shard_bytes >= _SHARD_BYTES:
                finish()
    if shard:
        finish()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return num_bytes


def size_of(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of such a checkpoint."""
    model = build_model(config, device=torch.device("meta"), dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure_loading(
    name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype, *, scratch: Path | None, rounds: int
) -> Iterator[Row]:
    """A row for the load from the page cache, and one for the load from memory. Raises `OSError` without room."""
    folder = Path(tempfile.mkdtemp(prefix="weights-", dir=scratch))
    try:
        needed, free = size_of(config, dtype), shutil.disk_usage(folder).free
        if free < 1.1 * needed:
            raise OSError(f"{needed / 1e9:.1f} GB are needed in {folder.parent}, {free / 1e9:.1f} GB are free")
        num_bytes = write_checkpoint(config, folder, dtype)
        # The floor on a CPU would be a copy in memory; there is no bus, and no bar.
        rate = pinned_rate(device) if device.type == "cuda" else None
        yield _row(name, "load", num_bytes, _seconds(config, folder, device, dtype, rounds, None), rate)
        cache = WeightCache(2 * num_bytes, free_bytes=lambda: 2**62, headroom_bytes=0)
        try:
            yield _row(name, "swap", num_bytes, _seconds(config, folder, device, dtype, rounds, cache), rate)
        finally:
            cache.close()
    finally:
        shutil.rmtree(folder)


def _seconds(
    config: dict[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    cache: WeightCache | None,
) -> list[float]:
    seconds = []
    if cache is not None:
        asyncio.run(_fill(cache, folder))
    for _ in range(rounds + 1):
        opened = None if cache is None else asyncio.run(cache.descriptors(folder))
        if opened == {}:
            raise RuntimeError("the checkpoint was not kept in memory")
        model = build_model(config, device=device, dtype=dtype)
        model.finish_loading = lambda: None  # type: ignore[method-assign]  # what follows has nothing to do with reading
        started = time.perf_counter()
        load_weights(model, folder, opened=opened)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        last = model.get_parameter("norm.weight")
        if last.isnan().any() or not (last == last[0]).all():
            raise RuntimeError("what was loaded is not what was written")
        del model, last
        gc.collect()
    return seconds[1:]  # the first one pins memory and pays the device's allocations


async def _fill(cache: WeightCache, folder: Path) -> None:
    cache.unloaded(folder, "bench")
    await cache.settled()


def _row(name: str, case: str, num_bytes: int, seconds: list[float], rate: float | None) -> Row:
    best = min(seconds)
    row: Row = {
        "model": name,
        "case": case,
        "bytes": num_bytes,
        "seconds": best,
        "gb_per_s": num_bytes / best / 1e9,
        "all_seconds": seconds,
    }
    if rate is not None:
        row |= {"floor_s": num_bytes / rate, "fraction": num_bytes / rate / best}
    return row
