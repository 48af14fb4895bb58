"""From an `EngineConfig` to a running engine: model, weights, cache, warm-up. Runs on the device thread.

Each rank of a group does this for its part. The ranks meet first; then each reads its weights at its own pace, and all
wait for the last over the control sockets, where no timeout runs; they agree on the size of the cache, and warm up
together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from neuron.checkpoint.config import ModelConfig, read_config
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import read_json
from neuron.checkpoint.gguf.checkpoint import opened, read_checkpoint
from neuron.checkpoint.gguf.files import is_gguf_file
from neuron.checkpoint.hyperparameters import check_values
from neuron.checkpoint.layout import cache_groups, dtype_of, graph_bytes, rank_sizes, uses_native_kernels
from neuron.checkpoint.sharding import ranks_of
from neuron.engine import kernels
from neuron.engine.attention.attention import make_attention_backend
from neuron.engine.errors import EngineError, ModelError, describe, is_device_fault, is_out_of_memory
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.loading.fault_injection import Faults, LoadPhase
from neuron.engine.loading.kernel_selection import settle_compute
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.parallel.messages import Figures, FollowerLink, LeaderLink
from neuron.engine.parallel.rendezvous import join_group
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.cuda_graphs import CudaGraphDevice
from neuron.engine.step.engine import Engine
from neuron.engine.step.follower import Follower
from neuron.engine.step.leader import StepLeader
from neuron.engine.step.runner import Launching, ModelRunner, StepRanks
from neuron.engine.step.step_memory import StepMemory
from neuron.engine.step.warm_up import every_variant
from neuron.engine.weights.loader import WeightsRead, load_dummy_weights, load_weights
from neuron.host_memory import available_host_bytes, num_physical_cores
from neuron.native_kernels import has_native_kernels
from neuron.protocol import CacheGroup, EngineConfig, EngineProgress, Loaded

logger = logging.getLogger(__name__)

Progress = Callable[[EngineProgress], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Without a figure in the configuration, a CPU engine's cache holds this many full-length sequences …
_DEFAULT_CPU_SEQUENCES = 4
# … but takes at most this part of the memory that is available.
_DEFAULT_CPU_SHARE = 0.25
# Part of the free device memory that the cache leaves to the allocator's fragmentation and to libraries.
_CUDA_RESERVE_SHARE = 0.05
# Progress is told at most this often; a checkpoint has thousands of tensors.
_PROGRESS_INTERVAL_S = 0.1


def load_engine(config: EngineConfig, *, progress: Progress = lambda progress: None) -> tuple[Engine, Loaded]:
    """Build the engine that `config` describes; of a group, rank 0's part, once the other ranks are ready with theirs.

    Raises `ModelError`: `bad_checkpoint`, `unsupported_architecture`, `unsupported_parallelism`, `out_of_memory`,
    `device` or `internal`; `DeviceError` where another rank is lost.
    """
    started = time.perf_counter()
    with _typed_errors():
        report = _Reporter(progress, Faults(config.debug, rank=0, epoch=config.epoch))
        report.phase("starting")
        device = _open_device(config, 0)
        if config.tensor_parallel_size == 1:
            rank = _load_rank(config, device, ParallelGroup.single(), None, report)
        else:
            link = LeaderLink(Path(config.group_dir), epoch=config.epoch, world_size=config.tensor_parallel_size)
            group = _join(config, 0, device)
            link.accept(timeout_s=config.collective_timeout_s)
            rank = _load_rank(config, device, group, link, report)
        return _serve_rank(config, rank, started)


def load_follower(
    config: EngineConfig,
    *,
    rank: int,
    progress: Progress = lambda progress: None,
    on_link: Callable[[FollowerLink], None] = lambda link: None,
) -> Follower:
    """Build the part of another rank than 0, ready to follow.

    on_link gets the connection to rank 0 as soon as it is there: closing it ends whatever waits on it. Raises as
    `load_engine` does.
    """
    with _typed_errors():
        report = _Reporter(progress, Faults(config.debug, rank=rank, epoch=config.epoch))
        report.phase("starting")
        device = _open_device(config, rank)
        group = _join(config, rank, device)
        link = FollowerLink(Path(config.group_dir), epoch=config.epoch, rank=rank)
        on_link(link)
        return Follower(_load_rank(config, device, group, link, report).runner, link)


def read_hf_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder, or what a GGUF file says in its place, with senseless values refused.

    Raises `CheckpointError`.
    """
    if is_gguf_file(path):
        return _read_gguf_config(path)
    file = path / "config.json"
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise CheckpointError("config.json is not a JSON object")
        check_values(config)
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc.message}", file=exc.file) from exc
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}", file=file.name) from exc
    return config


def _read_gguf_config(path: Path) -> dict[str, Any]:
    try:
        with opened(path) as descriptors:
            config = read_checkpoint(path, descriptors).config
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}", file=path.name) from exc
    check_values(config)
    return config


def resolve_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of weights and activations (`checkpoint.layout.dtype_of`)."""
    return _DTYPES[dtype_of(config, model)]


def num_cache_pages(
    config: EngineConfig, layout: KVLayout, max_model_len: int, device: torch.device, reserved_bytes: int = 0
) -> int:
    """Pages (page 0 included) of this rank's cache: as configured, else from the memory that is free now.

    reserved_bytes: what the device is still to hold beside it.
    Raises `ModelError` (`out_of_memory`).
    """
    if config.kv_cache_bytes is not None:
        return layout.pages_for_bytes(config.kv_cache_bytes)
    if config.kv_cache_tokens is not None:
        return layout.pages_for_tokens(config.kv_cache_tokens)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return layout.pages_for_bytes(max(int(free_bytes * (1.0 - _CUDA_RESERVE_SHARE)) - reserved_bytes, 0))
    wanted = layout.pages_for_tokens(_DEFAULT_CPU_SEQUENCES * max_model_len)
    # Ranks on the CPU take from the same memory.
    budget = int(available_host_bytes() * _DEFAULT_CPU_SHARE) // config.tensor_parallel_size
    return min(wanted, layout.pages_for_bytes(budget))


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except CheckpointError as exc:
        raise ModelError(exc.kind, exc.message) from exc
    except Exception as exc:
        if is_out_of_memory(exc):
            raise ModelError("out_of_memory", describe(exc)) from exc
        if is_device_fault(exc):
            raise ModelError("device", describe(exc)) from exc
        raise


class _Reporter:
    """Passes on progress, but not more often than anybody can see; with faults, not always."""

    def __init__(self, progress: Progress, faults: Faults) -> None:
        self._progress = progress
        self.faults = faults
        self._last = 0.0

    def phase(self, name: LoadPhase) -> None:
        self._progress(EngineProgress(name, 0, 0))
        self.faults.enter(name)

    def weights(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= _PROGRESS_INTERVAL_S:
            self._last = now
            self._progress(EngineProgress("weights", done, total))


@dataclass(slots=True)
class _Rank:
    """One rank's part of a loaded model. figures: agreed on by all ranks."""

    runner: ModelRunner
    model: CausalLM
    architecture: str
    max_model_len: int
    figures: Figures


def _load_rank(
    config: EngineConfig,
    device: torch.device,
    group: ParallelGroup,
    link: LeaderLink | FollowerLink | None,
    report: _Reporter,
) -> _Rank:
    path = Path(config.path)
    hf_config = read_hf_config(path)
    described = read_config(hf_config)
    dtype, native = resolve_dtype(config, described), uses_native_kernels(config, described)

    report.phase("weights")
    model = build_model(hf_config, device=device, dtype=dtype, parallel=group, native=native)
    read = WeightsRead(0, 0.0)
    if config.load_format == "dummy":
        load_dummy_weights(model, seed=0)
    else:
        read = load_weights(
            model, path, opened=config.weight_descriptors, progress=report.faults.slowed(report.weights)
        )

    report.phase("kv_cache")
    shape = model.config
    layout = KVLayout(cache_groups(shape, model.local, dtype.itemsize), config.page_size, dtype)
    max_model_len = shape.max_position_embeddings
    if config.max_model_len is not None:
        max_model_len = min(max_model_len, config.max_model_len)
    max_running = min(config.max_running, config.max_step_tokens)
    limits = StepLimits(config.max_step_tokens, max_running, max_model_len)
    memory = None if link is None else StepMemory(model.local, dtype=dtype, device=device, world_size=group.world_size)

    attention = make_attention_backend(
        device, deterministic=config.deterministic, native=native and dtype == torch.float32
    )
    overlaps = config.overlap if config.overlap is not None else device.type == "cuda"
    has_graphs = config.cuda_graphs and kernels.is_available(device)
    graphs_bytes = 0
    if has_graphs:
        graphs_bytes = graph_bytes(model.local, dtype.itemsize, max_running=max_running)

    def build_runner(num_pages: int, *, is_last: bool = True) -> ModelRunner:
        return ModelRunner(
            report.faults.around(model),
            PagedKV(layout, num_pages, device),
            attention,
            vocab_size=shape.vocab_size,
            limits=limits,
            deterministic=config.deterministic,
            launching=Launching(overlaps=overlaps, graphs=CudaGraphDevice() if has_graphs and is_last else None),
            ranks=StepRanks(group, StepLeader(link) if isinstance(link, LeaderLink) else None, memory),
        )

    figures = Figures(
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        kv_bytes_per_token=layout.bytes_per_token,
        read_bytes=read.num_bytes,
        read_seconds=read.seconds,
    )
    if link is not None:
        # Warming up has collectives: it begins when the last rank has read its weights.
        link.agree(figures)
    settle_compute(
        model, attention, group=group, device=device, page_size=config.page_size, max_model_len=max_model_len,
        deterministic=config.deterministic,
    )  # fmt: skip
    if device.type == "cuda":
        # The largest step first, over the smallest cache: what it leaves in the allocator is the activations' share.
        build_runner(2, is_last=False).warm_up(config.max_step_tokens, max_running)
    num_pages = num_cache_pages(config, layout, max_model_len, device, graphs_bytes)
    figures = msgspec.structs.replace(figures, num_pages=num_pages)
    if link is not None:
        figures = link.agree(figures)
    runner = build_runner(figures.num_pages)
    report.phase("warm_up")
    runner.warm_up(min(config.max_step_tokens, 2 * config.page_size))
    if device.type == "cuda":
        every_variant(
            runner, max_step_tokens=config.max_step_tokens, max_running=max_running, max_model_len=max_model_len
        )
    report.faults.arm()
    if device.type == "cuda":
        runner.compiles.arm()
    if link is not None:
        link.agree(figures)  # all are ready
    architectures = hf_config.get("architectures") or [type(model).__name__]
    return _Rank(runner, model, str(architectures[0]), max_model_len, figures)


def _groups_of_all(model: CausalLM) -> tuple[CacheGroup, ...]:
    """The cache of all ranks together, whose KV heads may be held by several."""
    group = model.group
    held = [rank_sizes(model.config, rank) for rank in ranks_of(group.world_size, group.shares)]
    whole = msgspec.structs.replace(model.local, num_kv_heads=sum(rank.num_kv_heads for rank in held))
    return cache_groups(model.config, whole, model.dtype.itemsize)


def _serve_rank(config: EngineConfig, rank: _Rank, started: float) -> tuple[Engine, Loaded]:
    """The engine around rank 0's part, and what is told of it."""
    model, figures = rank.model, rank.figures
    _record_first_graphs(rank.runner, model.device)
    engine = Engine(
        rank.runner,
        keeps_decodes_even=model.device.type == "cpu",
        tokenizer_json=config.tokenizer_json,
        prefix_cache=config.prefix_cache,
        cache_root=config.model_id,
        epoch=config.epoch,
    )
    loaded = Loaded(
        epoch=config.epoch,
        architecture=rank.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=engine.max_model_len,
        vocab_size=model.config.vocab_size,
        num_pages=figures.num_pages - 1,
        page_size=config.page_size,
        kv_bytes_per_token=figures.kv_bytes_per_token,
        cache_groups=_groups_of_all(model),
        weight_bytes=figures.weight_bytes,
        load_seconds=time.perf_counter() - started,
        step_deadline_s=engine.stats().step_deadline_s,
        read_bytes=figures.read_bytes,
        read_seconds=figures.read_seconds,
        read_from_memory=bool(config.weight_descriptors),
        computed_by=_computed_by(model),
    )
    logger.info(
        "loaded %s (%s, %s on %s, %d ranks): %.1f MB of weights, %d KV pages of %d tokens, %d positions, %.2f s; "
        "computed by %s",
        config.model_id,
        loaded.architecture,
        loaded.dtype,
        model.device,
        config.tensor_parallel_size,
        figures.weight_bytes / 1e6,
        loaded.num_pages,
        loaded.page_size,
        loaded.max_model_len,
        loaded.load_seconds,
        loaded.computed_by,
    )
    return engine, loaded


def _record_first_graphs(runner: ModelRunner, device: torch.device) -> None:
    """Those that cover every batch size with some padding; the followers, which are in their loops by now, do too."""
    if runner.graphs is None:
        return
    runner.graphs.forget_misses()
    began, before = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
    for key in runner.graphs.keys_at_load():
        runner.capture_graph(key)
    taken = before - torch.cuda.mem_get_info(device)[0]
    logger.info(
        "recorded %d CUDA graphs in %.2f s: %.1f MB",
        len(runner.graphs.captured),
        time.perf_counter() - began,
        taken / 1e6,
    )


def _computed_by(model: CausalLM) -> str:
    """What the last bits of results depend on, beside what is asked for."""
    device = model.device
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        if model.embed_tokens.uses_native_kernels:
            import neuron_cpu

            kind += f", native kernels for {neuron_cpu.instructions()}"
    return f"{kind}, torch {torch.__version__}"


def _join(config: EngineConfig, rank: int, device: torch.device) -> ParallelGroup:
    return join_group(
        Path(config.group_dir),
        rank=rank,
        world_size=config.tensor_parallel_size,
        device=device,
        shares=config.shares,
        timeout_s=config.collective_timeout_s,
        use_symmetric_memory=config.all_reduce == "auto",
    )


def _open_device(config: EngineConfig, rank: int) -> torch.device:
    """This rank's device, made current. Raises `ModelError` (`device`, `unsupported_parallelism`)."""
    if config.tensor_parallel_size > 1 and not config.group_dir:
        raise ModelError("unsupported_parallelism", "a group of ranks needs a folder to meet in (group_dir)")
    torch.set_num_threads(max((config.num_threads or num_physical_cores()) // config.tensor_parallel_size, 1))
    if not config.devices:
        if has_native_kernels():
            from neuron_cpu import set_num_threads

            set_num_threads(torch.get_num_threads())
        return torch.device("cpu")
    if len(config.devices) < config.tensor_parallel_size:
        raise ModelError(
            "device", f"{config.tensor_parallel_size} ranks need as many devices, got {list(config.devices)}"
        )
    index = config.devices[rank]
    if not torch.cuda.is_available():
        raise ModelError("device", f"device {index} was asked for, but torch sees no CUDA device")
    if index >= torch.cuda.device_count():
        raise ModelError("device", f"device {index} was asked for, but there are only {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # Not the default stream: what is recorded for replay is recorded on the stream that all steps run on.
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return device
