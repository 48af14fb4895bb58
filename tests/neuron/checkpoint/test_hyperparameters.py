"""Configs whose values cannot be: refused by both sides, before either does anything with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.checkpoint.config import read_config
from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.families import family_of
from neuron.checkpoint.hyperparameters import (
    FLAGS,
    INTEGERS,
    ROPE_NUMBERS,
    check_values,
)
from neuron.checkpoint.layout import rank_sizes
from neuron.checkpoint.sharding import RankOf
from neuron.checkpoint.tensor_shapes import check_shapes
from neuron.engine.layers.rotary import inverse_frequencies
from neuron.engine.models.registry import build_model

from tests.neuron.checkpoint_folders import TINY
from tests.neuron.rounds import ROUNDS

ABSURD = [10**9, 10**12, 0, -1, "12", 3.5, True, [], {}, 10**30, -(10**30), 1e300]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key, (least, most) in INTEGERS.items()
        for value in ABSURD
        if type(value) is not int or not least <= value <= most
    ],
    ids=str,
)
def test_H8_an_absurd_size_is_refused_by_name_on_both_sides(key: str, value: Any, nested: bool) -> None:
    least, most = INTEGERS[key]
    config = TINY | {key: value}
    config = {"model_type": "outer", "text_config": config} if nested else config
    words = rf"config\.json: {key} must be an? .*integer, got .* \({least} to {most}\)"
    with pytest.raises(CheckpointError, match=words):
        check_values(config)
    with pytest.raises(CheckpointError, match=key):
        read_config(config)


@pytest.mark.parametrize("value", ["x", 0, -1.0, True, [], 1e300, None], ids=str)
@pytest.mark.parametrize("key", ROPE_NUMBERS)
def test_H8_absurd_rope_is_refused_by_name(key: str, value: Any) -> None:
    config = TINY | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, key: value}}
    if value is None or (value == 0 and type(value) is int and key.startswith("mscale")):
        check_values(config)
        return
    with pytest.raises(CheckpointError, match=rf"rope_scaling\.{key} must be a positive number"):
        check_values(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e5}, "max_position_embeddings": 2**20}, "factor must be at"),
        ({"rope_parameters": [1]}, "rope parameters must be an object"),
        ({"rope_parameters": {"low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "high_freq_factor must be more"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3 KV heads"),
        ({"head_dim": 15}, "head_dim must be an even number"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 3}, "leaves 4 attention heads no dimension"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 12}, "head_dim must be an even number"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": [3]}, "architectures must be a list of names"),
        ({"architectures": ["x"] * 1000}, "architectures lists 1000 names"),
        ({"layer_types": {"a": "b"}}, "layer_types must be a list of names"),
        ({"layer_types": ["full_attention"] * 10**5}, "layer_types lists 100000 names"),
        ({"model_type": ["qwen3"]}, "model_type must be a name"),
        ({"model_type": "q" * 10**6}, "model_type must be a name"),
        *(({flag: "false"}, f"{flag} must be true or false") for flag in FLAGS),
    ],
    ids=lambda value: str(value)[:60],
)
def test_H8_what_contradicts_itself_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(TINY | change)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_what_is_missing_is_refused_where_all_of_it_is_needed(key: str) -> None:
    config = {name: value for name, value in TINY.items() if name != key}
    check_values(config)
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        read_config(config)


# ---------------------------------------------------------------- the engine agrees

odd = st.one_of(
    st.integers(-2, 64),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(ABSURD),
    st.sampled_from([None, "yarn", "linear", "llama3", "default", "silu", "gelu", "sliding_attention", False]),
)
rope = st.one_of(
    st.none(),
    odd,
    st.dictionaries(
        st.sampled_from([*ROPE_NUMBERS, "rope_type", "type", "truncate"]),
        st.one_of(odd, st.floats(0.5, 8), st.sampled_from(["yarn", "linear", "llama3", "default"])),
        max_size=6,
    ),
)
changes = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.one_of(odd, st.integers(1, 12)) for key in INTEGERS},
        **dict.fromkeys(FLAGS, st.one_of(st.booleans(), odd)),
        "rms_norm_eps": odd,
        "rope_theta": odd,
        "partial_rotary_factor": st.one_of(odd, st.floats(0, 1)),
        "rope_scaling": rope,
        "rope_parameters": rope,
        "layer_types": st.one_of(odd, st.lists(st.one_of(odd, st.just("full_attention")), max_size=4)),
        "hidden_act": odd,
        "quantization_config": st.one_of(odd, st.dictionaries(st.text(max_size=3), odd, max_size=2)),
        "architectures": st.one_of(odd, st.lists(odd, max_size=2)),
        "torch_dtype": odd,
        "model_type": st.sampled_from(["qwen3", "llama", "qwen2", "mistral"]),
    },
)


@settings(max_examples=5 * ROUNDS, deadline=None)
@given(changes, st.booleans())
def test_H8_what_passes_is_built_or_refused_with_a_reason(change: dict[str, Any], nested: bool) -> None:
    """No config ends in an error that has no type, nor in a model that takes long to describe."""
    config: dict[str, Any] = TINY | {"num_hidden_layers": 1} | change
    config = {"text_config": config} if nested else config
    try:
        known = read_config(config)
    except CheckpointError as exc:
        json.dumps([exc.message, exc.facts])
        assert len(exc.message) < 1_000
        return
    assert 1 <= known.num_layers <= 1024 and rank_sizes(known, RankOf()).num_heads == known.num_heads
    rotary_dim = int(known.head_dim * known.rope.partial_rotary_factor)
    assert torch.isfinite(inverse_frequencies(known.rope, rotary_dim)).all()
    if known.num_layers <= 4:
        model = build_model(config, device=torch.device("cpu"), dtype=torch.float32)
        assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"hidden_act": ["silu"] * 10_000}, "activation \\['silu'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported, only",
        ),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "differ between layer types"),
        ({"rope_scaling": {"rope_type": 7}}, "rope type 7 is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_layer_has_is_known_before_an_engine_starts(change: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupported, match=words) as caught:
        read_config(TINY | change)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"])
def test_H8_sizes_that_are_not_those_of_the_weights_are_refused(key: str) -> None:
    from neuron.checkpoint.safetensors_header import parse_header

    from tests.neuron.checkpoint_folders import header_of, shapes_of

    header, num_bytes = header_of(shapes_of(TINY))
    tensors = parse_header(json.dumps(header).encode(), data_bytes=num_bytes, file="f")
    names = family_of(TINY).tensor_names
    check_shapes(read_config(TINY), names, tensors)
    with pytest.raises(CheckpointError, match=r"another shape than config\.json says|lacks tensors"):
        check_shapes(read_config(TINY | {key: TINY[key] * 2}), names, tensors)
