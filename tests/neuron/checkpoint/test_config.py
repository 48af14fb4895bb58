from __future__ import annotations

from typing import Any

import pytest
from neuron.checkpoint.config import read_config
from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.rope import RopeScaling

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def test_sizes_are_read_and_the_rest_has_defaults() -> None:
    config = read_config(BASE)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 8)
    assert config.rms_norm_eps == 1e-6
    assert config.rope == RopeScaling()
    assert not config.tie_word_embeddings
    assert config.sliding_windows == (None,) * 4
    assert config.dtype is None


def test_head_dim_may_be_explicit_derived_or_the_familys() -> None:
    assert read_config(BASE | {"head_dim": 32}).head_dim == 32
    assert read_config(BASE | {"head_dim": None}).head_dim == 8
    assert read_config(BASE | {"model_type": "qwen3"}).head_dim == 128


def test_kv_heads_default_to_attention_heads() -> None:
    hf = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    assert read_config(hf).num_kv_heads == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_stored_dtype_has_two_names(key: str, dtype: str) -> None:
    assert read_config(BASE | {key: dtype}).dtype == "bfloat16"


def test_N1_hyperparameters_may_be_nested() -> None:
    """N1: everything, rope parameters too, may sit under `text_config`."""
    nested = BASE | {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    config = read_config({"model_type": "outer", "text_config": nested, "tie_word_embeddings": True})
    assert config.model_type == "qwen3"
    assert config.rope.theta == 77.0
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeScaling(theta=5e5)),
        ({"rope_theta": 5e5}, RopeScaling(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeScaling(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeScaling(rope_type="linear", theta=5e5, factor=2.0, original_max_positions=4096),
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
            RopeScaling(theta=1e4, partial_rotary_factor=0.25),
        ),
    ],
)
def test_rope_of_either_vintage(form: dict[str, Any], expected: RopeScaling) -> None:
    assert read_config(BASE | form).rope == expected


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_llama3_rope(form: str) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf: dict[str, Any] = BASE | {form: scaling, "rope_theta": 5e5}
    rope = read_config(hf).rope
    assert rope == RopeScaling(
        rope_type="llama3", theta=5e5, factor=8.0, high_freq_factor=4.0, original_max_positions=8192
    )
    del scaling["high_freq_factor"]
    with pytest.raises(CheckpointError, match="high_freq_factor"):
        read_config(hf)


def test_yarn_as_qwen_documents_it_extends_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read_config(BASE | {"rope_scaling": scaling, "max_position_embeddings": 40960})
    assert config.rope.attention_factor == pytest.approx(1.1386294)
    assert (config.rope.beta_fast, config.rope.beta_slow, config.rope.truncate) == (32.0, 1.0, True)
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported, only default"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layer types"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
    ],
)
def test_features_that_are_missing_here_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message) as caught:
        read_config(BASE | change)
    assert caught.value.kind == "unsupported_architecture"


def test_quantised_weights_are_refused_by_their_method() -> None:
    with pytest.raises(NotSupported, match="quantised with `fp8`") as caught:
        read_config(BASE | {"quantization_config": {"quant_method": "fp8"}})
    assert (caught.value.kind, caught.value.facts) == ("quant_unsupported", {"requested": "fp8"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "8 attention heads do not divide among 3"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing, which the rope type linear needs"),
    ],
)
def test_senseless_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(BASE | change)
    assert caught.value.kind == "bad_checkpoint"
