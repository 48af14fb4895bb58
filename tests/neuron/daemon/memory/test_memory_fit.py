"""Which loads fit beside what is there, with how much context, and what is said where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.errors import ApiError
from hypothesis import given
from hypothesis import strategies as st
from neuron.checkpoint.config import read_config
from neuron.checkpoint.layout import StoredTensor, footprints
from neuron.daemon.memory.memory_fit import MIN_CONTEXT_TOKENS, DeviceMemory, Fit, Resident, fit
from neuron.protocol import EngineConfig

MIB, GIB = 2**20, 2**30
FLOOR = 512 * MIB

# About Qwen3-8B: 16 GiB of bfloat16, 144 KiB of KV cache per token.
SHAPE = read_config(
    {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    }
)
WEIGHTS = [StoredTensor("model.layers.0.mlp.gate_proj.weight", 8 * 2**30, is_matrix=True)]


def host(available: float, *, total: float = 256, pending: float = 0) -> DeviceMemory:
    return DeviceMemory(None, int(available * GIB), int(total * GIB), int(pending * GIB))


def device(index: int, available: float, *, pending: float = 0) -> DeviceMemory:
    return DeviceMemory(index, int(available * GIB), 80 * GIB, int(pending * GIB))


def load(*memory: DeviceMemory, residents: list[Resident] | None = None, **settings: Any) -> Fit:
    config = EngineConfig(model_id="acme/model", path="/nowhere", **settings)
    places = [*memory] if any(each.index is None for each in memory) else [host(64), *memory]
    return fit(config, SHAPE, WEIGHTS, places, floor_bytes=FLOOR, residents=residents or [])


def refused(*memory: DeviceMemory, **settings: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        load(*memory, **settings)
    return caught.value


def test_a_host_with_plenty_serves_several_full_contexts() -> None:
    found = load(host(400, total=512))
    assert found.config.max_model_len == found.context_tokens == 40960
    assert found.config.kv_cache_tokens == 4 * 40960


def test_a_host_with_enough_for_one_context_serves_that_one() -> None:
    found = load(host(80))
    assert found.context_tokens == 40960
    tokens = found.config.kv_cache_tokens
    assert tokens is not None and 40960 <= tokens < 4 * 40960


def test_where_the_full_context_does_not_fit_it_is_lowered() -> None:
    found = load(host(45))
    tokens = found.config.kv_cache_tokens
    assert tokens is not None and found.config.max_model_len == tokens == found.context_tokens
    assert MIN_CONTEXT_TOKENS <= tokens < 40960 and found.full_context_tokens == 40960
    taken = found.bytes_on[None]
    assert 32 * GIB < taken <= 45 * GIB + 32 * GIB  # with second copies of the matrices, should there be room


def test_a_load_that_cannot_fit_is_refused_with_the_numbers() -> None:
    error = refused(host(30))
    assert error.status == 422 and error.code == "insufficient_memory" and error.retry_after is None
    facts = error.extras
    assert facts["kind"] == "insufficient_memory" and facts["free_mb"] == 30 * 1024
    (place,) = facts["devices"]
    assert place["device"] is None and place["weights_mb"] == 32 * 1024
    assert place["required_mb"] == facts["required_mb"] > 32 * 1024
    assert facts["would_fit"] == [{"engine.dtype": "bfloat16"}]
    for number in (facts["required_mb"], facts["free_mb"], 32 * 1024):
        assert str(number) in error.message
    assert "engine.dtype = bfloat16" in error.message


def test_where_nothing_would_help_that_is_said() -> None:
    error = refused(host(10))
    assert error.extras["would_fit"] == [] and "Nothing on this host" in error.message


def test_on_devices_the_engine_measures_its_cache_itself() -> None:
    found = load(device(0, 79), devices=(0,))
    assert found.config.kv_cache_bytes is None and found.config.kv_cache_tokens is None
    assert found.config.max_model_len is None
    assert found.context_tokens == 40960
    assert found.bytes_on == {0: 79 * GIB - FLOOR}  # it will fill the device
    assert load(device(0, 22), devices=(0,)).context_tokens < 40960


@pytest.mark.parametrize(
    ("memory", "settings", "options"),
    [
        ([device(0, 10), device(1, 70)], {"devices": (0,)}, [{"devices": [1]}]),
        (
            [device(0, 14), device(1, 14)],
            {"devices": (0,)},
            [{"tensor_parallel": 2, "devices": [0, 1]}],
        ),
        (
            [device(0, 8), device(1, 8), device(2, 8), device(3, 8)],
            {"devices": (0,)},
            [{"tensor_parallel": 4, "devices": [0, 1, 2, 3]}],  # three do not divide the heads
        ),
        ([device(0, 8)], {"devices": (0,)}, []),
    ],
)
def test_only_what_would_do_is_offered(
    memory: list[DeviceMemory], settings: dict[str, Any], options: list[dict[str, object]]
) -> None:
    error = refused(*memory, **settings)
    assert error.code == "insufficient_vram" and error.extras["would_fit"] == options


def test_what_is_offered_fits() -> None:
    memory = [device(0, 70)]
    (option,) = refused(*memory, devices=(0,), kv_cache_bytes=90 * GIB).extras["would_fit"]
    size = option["kv_cache_mb"] * MIB
    assert load(*memory, devices=(0,), kv_cache_bytes=size).config.kv_cache_bytes == size
    refused(*memory, devices=(0,), kv_cache_bytes=size + GIB)


def test_models_whose_end_would_make_room_are_named() -> None:
    residents = [
        Resident("busy/large", {0: 60 * GIB}, in_flight=3),
        Resident("idle/small", {0: 5 * GIB}),
        Resident("idle/large", {0: 12 * GIB}),
        Resident("elsewhere", {1: 70 * GIB}),
    ]
    assert refused(device(0, 10), devices=(0,), residents=residents).extras["would_fit"] == [{"unload": ["idle/large"]}]
    options = refused(device(0, 4), devices=(0,), residents=residents).extras["would_fit"]
    assert options == [{"unload": ["idle/large", "idle/small"]}]
    error = refused(device(0, 1), devices=(0,), residents=residents)
    assert error.extras["would_fit"] == [{"unload": ["idle/large", "idle/small", "busy/large"]}]
    assert "unloading `idle/large` and `idle/small` and `busy/large`" in error.message


def test_a_load_that_only_other_loads_stand_in_the_way_of_may_try_again() -> None:
    error = refused(device(0, 2, pending=60), devices=(0,))
    assert error.status == 503 and error.retry_after and error.code == "insufficient_vram"
    assert error.extras["kind"] == "insufficient_vram" and "61440 MiB" in error.message
    assert refused(device(0, 2, pending=4), devices=(0,)).status == 422


def test_a_configured_cache_is_taken_as_it_is() -> None:
    assert load(host(60), kv_cache_tokens=256).config.max_model_len == 256
    found = load(host(60), kv_cache_bytes=GIB)
    assert found.config.kv_cache_bytes == GIB and found.config.kv_cache_tokens is None
    assert found.context_tokens == GIB // (2 * 144 * 1024)
    assert refused(host(60), kv_cache_tokens=10**6).extras["would_fit"][0].keys() == {"kv_cache_mb"}


def test_ranks_on_a_cpu_share_its_memory() -> None:
    one, two = load(host(60)), load(host(60), tensor_parallel_size=2)
    assert two.context_tokens < one.context_tokens or two.context_tokens == 40960
    assert refused(host(34), tensor_parallel_size=2).extras["devices"][0]["weights_mb"] == 32 * 1024


@given(
    available=st.integers(1, 400),
    window=st.none() | st.integers(16, 10**6),
    ranks=st.sampled_from([1, 2, 4]),
    page_size=st.sampled_from([1, 16, 64]),
)
def test_what_fits_takes_no_more_than_there_is(available: int, window: int | None, ranks: int, page_size: int) -> None:
    config = EngineConfig(model_id="m", path="", max_model_len=window, tensor_parallel_size=ranks, page_size=page_size)
    try:
        found = fit(config, SHAPE, WEIGHTS, [host(available)], floor_bytes=FLOOR)
    except ApiError as exc:
        assert exc.code == "insufficient_memory" and exc.extras["required_mb"] > exc.extras["free_mb"]
        return
    parts = footprints(config, SHAPE, WEIGHTS)
    tokens = found.config.kv_cache_tokens
    assert tokens is not None and found.config.max_model_len is not None
    assert sum(part.fixed + part.cache_bytes(tokens) for part in parts) + FLOOR <= available * GIB
    assert min(MIN_CONTEXT_TOKENS, found.full_context_tokens) <= found.config.max_model_len <= tokens
    # More memory never means less context.
    more = fit(config, SHAPE, WEIGHTS, [host(available + 8)], floor_bytes=FLOOR)
    assert more.context_tokens >= found.context_tokens
