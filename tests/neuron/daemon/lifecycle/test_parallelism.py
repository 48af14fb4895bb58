"""What a load asks for, as ranks, devices and parts."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import DeviceInfo, ModelSpec
from neuron.checkpoint.preflight import world_size_of
from neuron.daemon.lifecycle.parallelism import check_parallelism, choose_devices, choose_shares

DEVICES = tuple(DeviceInfo(index, "card", 24_000) for index in range(4))


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec("org/model", **fields)


@pytest.mark.parametrize(
    ("fields", "devices", "code"),
    [
        ({"tensor_parallel": 0}, DEVICES, "tensor_parallel_invalid"),
        ({"tensor_parallel": 2, "tensor_split": (1.0,)}, (), "tensor_split_invalid"),
        ({"tensor_split": (1.0, 0.0)}, (), "tensor_split_invalid"),
        ({"tensor_parallel": 2, "devices": (0,)}, DEVICES, "device_count_mismatch"),
        ({"tensor_parallel": 2, "devices": (1, 1)}, DEVICES, "device_count_mismatch"),
        ({"tensor_parallel": 8}, DEVICES, "too_few_devices"),
    ],
)
def test_a_division_that_this_host_cannot_make_is_refused(
    fields: dict[str, Any], devices: tuple[DeviceInfo, ...], code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        check_parallelism(spec(**fields), devices)
    assert (caught.value.status, caught.value.code) == (422, code)


@pytest.mark.parametrize(
    ("fields", "ranks", "devices"),
    [
        ({}, 1, (0,)),
        ({"devices": (2, 3)}, 1, (2,)),  # as in the reference: a single-device load takes the first
        ({"tensor_parallel": 2}, 2, (0, 1)),
        ({"tensor_parallel": 2, "devices": (3, 1)}, 2, (3, 1)),
        ({"tensor_split": (2.0, 1.0, 1.0)}, 3, (0, 1, 2)),
    ],
)
def test_devices_are_those_asked_for_or_the_first(fields: dict[str, Any], ranks: int, devices: tuple[int, ...]) -> None:
    wanted = spec(**fields)
    check_parallelism(wanted, DEVICES)
    assert (world_size_of(wanted), choose_devices(wanted, DEVICES)) == (ranks, devices)
    assert choose_devices(wanted, ()) == ()


@pytest.mark.parametrize(
    ("fields", "free_mb", "shares"),
    [
        ({"tensor_parallel": 2}, {0: 9000, 1: 1000}, ()),
        ({"tensor_split": (3.0, 1.0)}, {}, (3, 1)),
        ({"tensor_split": (0.75, 0.25)}, {}, (1000, 333)),
        ({"tensor_parallel": 2, "tensor_split": "auto"}, {0: 24_000, 1: 12_000}, (24_000, 12_000)),
        ({"tensor_parallel": 2, "tensor_split": "auto"}, {0: 24_000, 1: 23_500}, ()),
        ({"tensor_parallel": 2, "tensor_split": "auto"}, {0: 24_000}, ()),
        ({"tensor_split": "auto"}, {0: 24_000}, ()),
    ],
)
def test_parts_are_equal_unless_asked_otherwise(
    fields: dict[str, Any], free_mb: dict[int, int], shares: tuple[int, ...]
) -> None:
    wanted = spec(**fields)
    assert choose_shares(wanted, choose_devices(wanted, DEVICES), free_mb) == shares


def test_parts_on_a_cpu_have_no_memory_of_their_own_to_compare() -> None:
    assert choose_shares(spec(tensor_parallel=2, tensor_split="auto"), (), {0: 1, 1: 2}) == ()
