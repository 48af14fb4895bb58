"""Division of a model among devices: what a load asks for, checked and made definite. Pure functions.

Whether the model's own sizes divide so is `divisibility`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cortex_core.fleet import DeviceInfo, ModelSpec

from neuron.checkpoint.preflight import refusal, world_size_of

# Free memory that differs by less than this between devices is no reason for unequal parts.
_ALIKE = 0.9
# Ratios given as fractions are kept to this precision.
_PRECISION = 1000


def check_parallelism(spec: ModelSpec, devices: Sequence[DeviceInfo]) -> None:
    """Whether this host, with these devices or none, can divide a model as asked for. Raises `ApiError` 422."""
    ranks = world_size_of(spec)
    if ranks < 1:
        raise refusal(
            "tensor_parallel_invalid",
            f"tensor_parallel must be at least 1, got {ranks}.",
            model_id=spec.model_id,
            tp_size=ranks,
        )
    split = spec.tensor_split
    if isinstance(split, tuple) and (len(split) != ranks or min(split, default=0) <= 0):
        raise refusal(
            "tensor_split_invalid",
            f"tensor_split needs one positive number for each of the {ranks} ranks, got {list(split)}.",
            model_id=spec.model_id,
            tp_size=ranks,
            tensor_split=list(split),
        )
    if not devices or ranks == 1:
        return
    if spec.devices is not None and (len(spec.devices) != ranks or len(set(spec.devices)) != ranks):
        raise refusal(
            "device_count_mismatch",
            f"tensor_parallel {ranks} needs {ranks} different devices, got {list(spec.devices)}.",
            model_id=spec.model_id,
            tp_size=ranks,
            requested=list(spec.devices),
        )
    if len(devices) < ranks:
        raise refusal(
            "too_few_devices",
            f"tensor_parallel {ranks} needs {ranks} devices, and this host has {len(devices)}.",
            model_id=spec.model_id,
            tp_size=ranks,
            available=[device.index for device in devices],
        )


def choose_devices(spec: ModelSpec, devices: Sequence[DeviceInfo]) -> tuple[int, ...]:
    """CUDA indexes by rank; none on a host without devices. For a spec that `check_parallelism` has passed."""
    ranks = world_size_of(spec)
    if not devices:
        return ()
    chosen = spec.devices if spec.devices else tuple(device.index for device in devices)
    return chosen[:ranks]


def choose_shares(spec: ModelSpec, devices: Sequence[int], free_mb: Mapping[int, int]) -> tuple[int, ...]:
    """Relative sizes of the ranks' parts, empty for equal ones.

    `auto` takes the devices' free memory as the ratio, unless they are alike or unknown. free_mb: by device index.
    """
    split = spec.tensor_split
    if split is None or world_size_of(spec) == 1:
        return ()
    if split == "auto":
        free = [free_mb.get(device, 0) for device in devices]
        if not free or min(free) <= 0 or min(free) >= _ALIKE * max(free):
            return ()
        return tuple(free)
    scale = 1 if all(float(part).is_integer() for part in split) else _PRECISION / max(split)
    return tuple(max(round(part * scale), 1) for part in split)
