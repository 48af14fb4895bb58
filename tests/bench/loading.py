"""Loading weights: ours beside `safetensors`, from the page cache, in one run.

Run: python tests/bench/loading.py [--gigabytes 2] [--folder DIR] [--device cpu|cuda] [--rounds 3] [--threads N]

Writes a checkpoint of Qwen3's tensor shapes and that size into a scratch folder (of DIR, which must be a disk and not
a tmpfs), reads it once so that it lies in the page cache, and then loads it in turn with

- `safetensors.safe_open(...).get_slice(...)`, one tensor after the other, copied into place (what every loader did
  before threads; `load_file` alone only maps the file on a CPU),
- `neuron.engine.weights.loader.load_weights` from the file,
- the same from a copy in memory (how a model that was unloaded comes back).

Cases: the checkpoint's own dtype, another one (a CPU's default is float32), and the part of one of two ranks. On a
device the floor is the rate of a large copy from pinned memory, measured here. Prints all rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weights.loader import load_weights
from neuron.engine.weights.pipeline import num_reader_threads
from safetensors import safe_open
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_checkpoint(folder: Path, gigabytes: float) -> dict[str, Any]:
    """bfloat16 with random bytes; returns its config."""
    layer = (2048 * (16 + 8 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144) * 2
    config = CONFIG | {"num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * 32768 * 2048) / layer))}
    model = build_model(config, device=torch.device("cpu"), dtype=torch.bfloat16)
    tensors = {}
    for prefix, module, part in model.checkpoint_modules():
        for weight_slice in module.weight_slices(part):
            tensor = torch.empty(weight_slice.checkpoint_shape, dtype=torch.bfloat16)
            tensors[f"{prefix}.{weight_slice.suffix}"] = tensor.fill_(0.01 * (len(tensors) % 97))
    save_file(tensors, folder / "model.safetensors")
    return config


def plain(config: dict[str, Any], folder: Path, device: torch.device, dtype: torch.dtype, rank: int, ranks: int) -> int:
    """Slice by slice with safetensors, as a loader without threads does it."""
    model = build_model(config, device=device, dtype=dtype, parallel=ParallelGroup(rank, ranks))
    memory: dict[tuple[int, str], torch.Tensor] = {}
    num_bytes = 0
    with safe_open(folder / "model.safetensors", framework="pt", device="cpu") as file:
        for prefix, module, part in model.checkpoint_modules():
            assert isinstance(module, torch.nn.Module)
            for weight_slice in module.weight_slices(part):
                key = (id(module), weight_slice.parameter)
                if key not in memory:
                    shape = module.get_parameter(weight_slice.parameter).shape
                    memory[key] = torch.empty(shape, dtype=dtype, device=device)
                read = file.get_slice(f"{prefix}.{weight_slice.suffix}")[weight_slice.source]
                memory[key][weight_slice.target].copy_(read.to(device))
                num_bytes += read.nbytes
    return num_bytes


def ours(
    config: dict[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    ranks: int,
    *,
    threads: int | None,
    memory: int | None = None,
) -> int:
    model = build_model(config, device=device, dtype=dtype, parallel=ParallelGroup(rank, ranks))
    model.finish_loading = lambda: None  # type: ignore[method-assign]  # rearranging is not reading
    opened = None if memory is None else {"model.safetensors": os.dup(memory)}
    return load_weights(model, folder, opened=opened, num_threads=threads).num_bytes


def pinned_rate(device: torch.device) -> float:
    """Bytes per second of a copy of 1 GiB from pinned memory, the best of five."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / min(seconds)


def rates(sides: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """GB/s of each round, the sides in turn; what was loaded is freed between them."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, load in sides.items():
            gc.collect()
            started = time.perf_counter()
            num_bytes = load()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[side].append(num_bytes / (time.perf_counter() - started) / 1e9)
    return found


def copy_in_memory(file: Path) -> int:
    copy = os.memfd_create(file.name)
    with file.open("rb") as source:
        while os.sendfile(copy, source.fileno(), None, 2**26):
            pass
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="reading at once (default: as in service)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, threads {num_reader_threads(1)}")
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=arguments.folder))
    try:
        config = write_checkpoint(folder, arguments.gigabytes)
        file = folder / "model.safetensors"
        copy = copy_in_memory(file)  # which also warms the page cache
        print(f"checkpoint of {file.stat().st_size / 1e9:.2f} GB in bfloat16, in the page cache")
        floor = None
        if device.type == "cuda":
            floor = pinned_rate(device)
            print(f"floor: {floor / 1e9:.1f} GB/s, a copy from pinned memory")
        print(f"{'GB/s (every round)':<40}{'best':>8}{'to plain':>10}{'of floor':>10}")
        for dtype, ranks in (("bfloat16", 1), ("float32", 1), ("bfloat16", 2)):
            case = (config, folder, device, DTYPES[dtype], ranks - 1, ranks)
            sides: dict[str, Callable[[], int]] = {
                "safetensors": lambda case=case: plain(*case),  # type: ignore[misc]
                "ours": lambda case=case: ours(*case, threads=arguments.threads),  # type: ignore[misc]
                "ours, from memory": lambda case=case: ours(*case, threads=arguments.threads, memory=copy),  # type: ignore[misc]
            }
            found = rates(sides, arguments.rounds, device)
            print(f"-- into {dtype}" + (f", one rank of {ranks}" if ranks > 1 else ""))
            for side, all_rounds in found.items():
                best = max(all_rounds)
                rounds = " ".join(f"{rate:.2f}" for rate in all_rounds)
                share = "" if floor is None else f"{best * 1e9 / floor:>10.0%}"
                print(f"{side + ': ' + rounds:<40}{best:>8.2f}{best / max(found['safetensors']):>9.1f}x{share}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
