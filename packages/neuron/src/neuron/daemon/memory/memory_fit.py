"""Memory fit of a load, and the context there is room for: decided before anything is started.

`fit` is a pure function of what is to be loaded and what is free. It answers with an `EngineConfig` that says how much
context and cache the engine is to have, or refuses with the numbers and with what would make it fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from cortex_core.errors import ApiError

from neuron.checkpoint.config import ModelConfig
from neuron.checkpoint.errors import UnsupportedSharding
from neuron.checkpoint.layout import Footprint, StoredTensor, dtype_of, footprints, rank_sizes
from neuron.checkpoint.preflight import refusal
from neuron.checkpoint.sharding import ranks_of
from neuron.daemon.admission.capacity import KVCapacity, KVNeed
from neuron.protocol import EngineConfig

_MIB = 2**20

# A context below this holds no conversation worth having: rather no model than one that refuses everything.
MIN_CONTEXT_TOKENS = 2048
# A CPU's cache holds this many full contexts if they take no more than a quarter of what is free …
_HOST_SEQUENCES = 4
_HOST_SHARE = 0.25
# … and up to half of it for a single one.
_HOST_SHARE_FOR_ONE = 0.5


class DeviceMemory(msgspec.Struct, frozen=True):
    """Bytes of a device, or of the host (index None). available: free, less what others were promised and have not
    taken yet; pending: what loads and unloads that are going on may yet give back."""

    index: int | None
    available: int
    total: int
    pending: int = 0


class Resident(msgspec.Struct, frozen=True):
    """A model that is here, and what its end would give back: bytes by device (None is the host)."""

    model_id: str
    bytes_on: dict[int | None, int]
    in_flight: int = 0


class Fit(msgspec.Struct, frozen=True):
    """A load that fits: with which settings, and the bytes it may take by device (None is the host). reclaim_bytes: of
    the host's, so many must be given up first by what may be."""

    config: EngineConfig
    bytes_on: dict[int | None, int]
    context_tokens: int
    full_context_tokens: int
    reclaim_bytes: int = 0


class _Demand(msgspec.Struct, frozen=True):
    """One device and the ranks that are to live there: ranks on a CPU share the host, on devices each has its own."""

    memory: DeviceMemory
    ranks: tuple[Footprint, ...]
    floor_bytes: int

    @property
    def fixed(self) -> int:
        """Bytes of everything but the KV cache."""
        return sum(rank.fixed for rank in self.ranks)

    @property
    def bytes_per_token(self) -> int:
        """What a token of the cache takes here, on all ranks."""
        return sum(rank.cache_bytes(1) for rank in self.ranks)

    @property
    def rest(self) -> int:
        """Bytes that are left for the cache; negative if there is less than the rest needs."""
        return self.memory.available - self.floor_bytes - self.fixed

    def required(self, num_tokens: int) -> int:
        """Bytes with a cache of so many tokens."""
        return self.floor_bytes + self.fixed + num_tokens * self.bytes_per_token


class _Case(msgspec.Struct, frozen=True):
    """A load on certain memory: its demands, and the tokens of the smallest cache that is worth it."""

    config: EngineConfig
    demands: tuple[_Demand, ...]
    least_tokens: int

    @property
    def capacity(self) -> KVCapacity:
        """The largest cache that fits on every device, less one page that is nobody's."""
        page_size = self.config.page_size
        pages = min(max(0, demand.rest) // demand.bytes_per_token // page_size for demand in self.demands)
        return KVCapacity(max(0, pages - 1), page_size, self.demands[0].ranks[0].kv_bytes_per_token)

    @property
    def fits(self) -> bool:
        """Decided by what decides of requests: the smallest cache worth having is one long prompt."""
        capacity = self.capacity
        pages = capacity.pages_for(self.least_tokens)
        return capacity.refusal(KVNeed(pages, pages)) is None


def fit(
    config: EngineConfig,
    model: ModelConfig,
    tensors: Sequence[StoredTensor],
    memory: Sequence[DeviceMemory],
    *,
    floor_bytes: int,
    residents: Iterable[Resident] = (),
) -> Fit:
    """The largest context that fits. floor_bytes stay free on every device.

    Raises `ApiError`: 422 `insufficient_vram` (a device) or `insufficient_memory` (the host) where not even the
    smallest useful context does; the same as a retryable 503 where only loads and unloads that are going on are in
    its way.
    """
    problem = _Problem(model, tensors, memory, floor_bytes)
    case = problem.case(config)
    if not case.fits:
        raise problem.refusal(case, list(residents))
    full = problem.full_context(config)
    if config.devices:
        # The engine measures what is left when its weights are in place, and caps the context by that.
        tokens = case.capacity.num_tokens
        has_size = config.kv_cache_bytes is not None or config.kv_cache_tokens is not None
        taken = {
            demand.memory.index: demand.required(case.least_tokens) - floor_bytes
            if has_size
            else max(0, demand.memory.available - floor_bytes)
            for demand in case.demands
        }
        return Fit(config, taken, min(full, case.least_tokens if has_size else tokens), full)
    (demand,) = case.demands
    tokens = _host_cache_tokens(config, case, full)
    if config.kv_cache_bytes is None:
        config = msgspec.structs.replace(config, kv_cache_tokens=tokens)
    context = min(full, tokens)
    taken_bytes = demand.required(tokens) - floor_bytes + sum(rank.second_copies for rank in demand.ranks)
    return Fit(msgspec.structs.replace(config, max_model_len=context), {None: taken_bytes}, context, full)


def _host_cache_tokens(config: EngineConfig, case: _Case, full: int) -> int:
    """As configured, else several full contexts within a quarter of what is free, or one within half of it."""
    if config.kv_cache_bytes is not None or config.kv_cache_tokens is not None:
        return case.least_tokens
    (demand,) = case.demands
    # Second copies of matrices come first, while half of the host's memory stays available.
    weights = sum(rank.weights for rank in demand.ranks)
    spare = max(0, demand.memory.available - weights - demand.memory.total // 2)
    rest = max(0, demand.rest - min(spare, sum(rank.second_copies for rank in demand.ranks)))
    comfortable = int(rest * _HOST_SHARE) // demand.bytes_per_token
    most = int(rest * _HOST_SHARE_FOR_ONE) // demand.bytes_per_token
    tokens = max(min(_HOST_SEQUENCES * full, max(comfortable, min(full, most))), case.least_tokens)
    return -(-tokens // config.page_size) * config.page_size


class _Problem:
    """One checkpoint on one host, for which several settings may be tried."""

    def __init__(
        self, model: ModelConfig, tensors: Sequence[StoredTensor], memory: Sequence[DeviceMemory], floor_bytes: int
    ) -> None:
        self._model = model
        self._tensors = tensors
        self._memory = memory
        self._floor_bytes = floor_bytes

    def full_context(self, config: EngineConfig) -> int:
        """Positions a sequence could have if memory were no matter."""
        return min(self._model.max_position_embeddings, config.max_model_len or self._model.max_position_embeddings)

    def case(self, config: EngineConfig) -> _Case:
        ranks = footprints(config, self._model, self._tensors)
        places: list[tuple[DeviceMemory, tuple[Footprint, ...]]]
        if config.devices:
            by_index = {each.index: each for each in self._memory}
            places = [(by_index[index], (rank,)) for index, rank in zip(config.devices, ranks, strict=False)]
        else:
            places = [(each, tuple(ranks)) for each in self._memory if each.index is None]
        if config.kv_cache_bytes is not None:
            least = max(config.kv_cache_bytes // rank.kv_bytes_per_token for rank in ranks)
        else:
            least = config.kv_cache_tokens or min(self.full_context(config), MIN_CONTEXT_TOKENS)
        return _Case(config, tuple(_Demand(place, parts, self._floor_bytes) for place, parts in places), least)

    def fits(self, config: EngineConfig) -> bool:
        return self.case(config).fits

    # ------------------------------------------------------------------ when it does not fit

    def refusal(self, case: _Case, residents: list[Resident]) -> ApiError:
        """Why not, in numbers, and what would help."""
        config, least = case.config, case.least_tokens + 2 * case.config.page_size
        worst = max(case.demands, key=lambda demand: demand.required(least) - demand.memory.available)
        index, available_mb = worst.memory.index, worst.memory.available // _MIB
        kind = "insufficient_memory" if index is None else "insufficient_vram"
        weights_mb = _mb_up(sum(rank.weights for rank in worst.ranks))
        numbers = (
            f"`{config.model_id}` does not fit: it needs {_mb_up(worst.required(least))} MiB of "
            f"{'the host' if index is None else f'device {index}'} ({weights_mb} MiB of weights, the rest for a cache "
            f"of {case.least_tokens} tokens, activations and the engine), and {available_mb} MiB are "
            + ("all it has." if worst.memory.available >= worst.memory.total else "available.")
        )
        facts = {
            "model_id": config.model_id,
            "required_mb": _mb_up(worst.required(least)),
            "free_mb": available_mb,
            "devices": [_facts(demand, least) for demand in case.demands],
        }
        patient = _Case(config, tuple(_when_all_is_over(demand) for demand in case.demands), case.least_tokens)
        if patient.fits:
            return ApiError(
                "overloaded",
                f"{numbers} Loads and unloads that are going on may free {_mb_up(worst.memory.pending)} MiB more.",
                code=kind,
                retry_after=10,
                extras={"kind": kind, **facts},
            )
        options = self._options(case, residents)
        said = "; or ".join(_words(option) for option in options)
        advice = f" What would make it fit: {said}." if said else " Nothing on this host would make it fit."
        return refusal(kind, numbers + advice, **facts, would_fit=options)

    def _options(self, case: _Case, residents: list[Resident]) -> list[dict[str, object]]:
        """Changes to the load or to this host, each of which alone would do. Only what exists is offered."""
        replace, config = msgspec.structs.replace, case.config
        options: list[dict[str, object]] = []
        unsized = replace(config, kv_cache_bytes=None, kv_cache_tokens=None)
        if unsized != config and self.fits(unsized):
            largest = self.case(unsized).capacity
            options.append({"kv_cache_mb": max(1, largest.megabytes(largest.num_pages))})
        freest = sorted((each for each in self._memory if each.index is not None), key=lambda each: -each.available)
        indexes = tuple(each.index for each in freest if each.index is not None)
        size = config.tensor_parallel_size
        if config.devices:
            moved = replace(config, devices=indexes[:size], shares=())
            if set(moved.devices) != set(config.devices) and self.fits(moved):
                options.append({"devices": list(moved.devices)})
            for wider in range(size + 1, len(indexes) + 1):
                spread = replace(config, devices=indexes[:wider], tensor_parallel_size=wider, shares=())
                if _divides(self._model, wider) and self.fits(spread):
                    options.append({"tensor_parallel": wider, "devices": list(spread.devices)})
                    break
        elif dtype_of(config, self._model) == "float32" and self.fits(replace(config, dtype="bfloat16")):
            options.append({"engine.dtype": "bfloat16"})
        victims = _victims(case, residents)
        if victims:
            options.append({"unload": victims})
        return options


def _when_all_is_over(demand: _Demand) -> _Demand:
    memory = demand.memory
    patient = msgspec.structs.replace(memory, available=memory.available + memory.pending, pending=0)
    return msgspec.structs.replace(demand, memory=patient)


def _facts(demand: _Demand, num_tokens: int) -> dict[str, object]:
    return {
        "device": demand.memory.index,
        "required_mb": _mb_up(demand.required(num_tokens)),
        "available_mb": demand.memory.available // _MIB,
        "weights_mb": _mb_up(sum(rank.weights for rank in demand.ranks)),
        "activations_mb": _mb_up(sum(rank.activations for rank in demand.ranks)),
        "overhead_mb": _mb_up(sum(rank.overhead for rank in demand.ranks)),
        "kv_bytes_per_token": demand.bytes_per_token,
    }


def _divides(model: ModelConfig, world_size: int) -> bool:
    """Whether the model can be divided among so many equal ranks, by the decision that loads are refused by."""
    try:
        for rank in ranks_of(world_size):
            rank_sizes(model, rank)
    except UnsupportedSharding:
        return False
    return True


def _victims(case: _Case, residents: list[Resident]) -> list[str]:
    """Models whose end would make room: as few as it takes, those without requests and the largest first."""
    least = case.least_tokens + 2 * case.config.page_size
    missing = {demand.memory.index: demand.required(least) - demand.memory.available for demand in case.demands}

    def gain(resident: Resident) -> int:
        return sum(resident.bytes_on.get(index, 0) for index, lack in missing.items() if lack > 0)

    victims: list[str] = []
    for resident in sorted(residents, key=lambda each: (each.in_flight > 0, -gain(each))):
        if not any(lack > 0 for lack in missing.values()):
            break
        if gain(resident) > 0:
            victims.append(resident.model_id)
            missing = {index: lack - resident.bytes_on.get(index, 0) for index, lack in missing.items()}
    return [] if any(lack > 0 for lack in missing.values()) else victims


def _words(option: dict[str, object]) -> str:
    """An option in a sentence."""
    if "unload" in option:
        names = option["unload"]
        assert isinstance(names, list)
        return "unloading " + " and ".join(f"`{name}`" for name in names)
    return " and ".join(f"{key} = {value}" for key, value in option.items())


def _mb_up(num_bytes: int) -> int:
    return -(-num_bytes // _MIB)
