"""A `config.json` from the metadata of a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from neuron.checkpoint.config import read_config
from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.gguf.header import read_header
from neuron.checkpoint.gguf.model_config import config_of

from tests.neuron.checkpoint.gguf.writer import model_metadata, write


def config(folder: Path, metadata: dict[str, Any], *, names: tuple[str, ...] = (), divisors: Any = None) -> Any:
    path = write(folder / "x.gguf", metadata, {})
    descriptor = os.open(path, os.O_RDONLY)
    try:
        values = read_header(descriptor, "x.gguf").metadata
    finally:
        os.close(descriptor)
    return config_of(values, file="x.gguf", names=names, rope_divisors=divisors)


@pytest.mark.parametrize(
    ("architecture", "names", "model_type", "bias"),
    [
        ("llama", ("output.weight",), "llama", False),
        ("qwen2", ("blk.0.attn_q.bias",), "qwen2", True),
        ("qwen3", (), "qwen3", False),
        ("mistral3", ("output.weight",), "mistral", False),
    ],
)
def test_hyperparameters_are_those_of_the_file(
    tmp_path: Path, architecture: str, names: tuple[str, ...], model_type: str, bias: bool
) -> None:
    found = config(tmp_path, model_metadata(architecture, vocab=77), names=names)
    model = read_config(found)
    assert model.model_type == model_type and model.attention_bias == bias
    assert (model.num_layers, model.hidden_size, model.intermediate_size) == (2, 64, 128)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (4, 2, 16, 77)
    assert model.rms_norm_eps == 1e-5, "the number that the float32 was made of"
    assert model.tie_word_embeddings == ("output.weight" not in names)
    assert model.max_position_embeddings == 256 and found["eos_token_id"] == [2]


def test_scalings_of_the_rotary_embedding(tmp_path: Path) -> None:
    linear = model_metadata(rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert read_config(config(tmp_path, linear)).rope.factor == 4.0
    yarn = model_metadata(
        "qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=64
    )
    assert read_config(config(tmp_path, yarn)).rope.rope_type == "yarn"
    model = read_config(config(tmp_path, model_metadata(), divisors=[1.0] * 4 + [8.0] * 4))
    assert model.rope.divisors == (1.0,) * 4 + (8.0,) * 4
    with pytest.raises(CheckpointError, match="3 divisors of frequencies, and 8 pairs"):
        read_config(config(tmp_path, model_metadata(), divisors=[1.0] * 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count is 8, and no layer here has that"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ({"attention__head_count_kv": [2, 1]}, "attention.head_count_kv differs between layers"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"rope__dimension_count": 8}, "rope.dimension_count 8 of heads of 16"),
    ],
)
def test_what_no_layer_has_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message):
        config(tmp_path, model_metadata(**changes))


def test_a_value_for_each_layer_may_be_one_for_all(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, model_metadata(attention__head_count_kv=[2, 2]))).num_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"embedding_length": "much"}, "embedding_length must be a number"),
        ({"embedding_length": 63}, "embedding_length 63 does not divide among 4 heads"),
    ],
)
def test_what_is_missing_or_senseless_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(tmp_path, model_metadata(**changes))


def test_other_architectures_are_refused_with_what_is_served(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="architecture 'mamba' is not supported; of GGUF files, those of llama"):
        config(tmp_path, model_metadata("mamba"))
    with pytest.raises(NotSupported, match="a file of the type 'mmproj'"):
        config(tmp_path, model_metadata("clip") | {"general.type": "mmproj"})
