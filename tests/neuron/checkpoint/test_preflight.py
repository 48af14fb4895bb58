from __future__ import annotations

from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import DeviceInfo, ModelSpec
from hypothesis import given
from hypothesis import strategies as st
from neuron.checkpoint.preflight import (
    check_config,
    check_layout,
    check_spec,
    classify,
    edit_distance,
    quant_of,
)

DENSE = ["config.json", "tokenizer.json", "model.safetensors"]
GGUF = ["README.md", "model-Q4_K_M.gguf", "model-Q6_K.gguf", "model-Q8_0.gguf"]


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec("acme/model", **fields)


def refused(check: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check(*arguments)
    error = caught.value
    assert error.status == 422 and error.extras["kind"] == error.code
    return error


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (DENSE, "dense"),
        (GGUF, "gguf"),
        ([*DENSE, *GGUF], "mixed"),
        (["model_index.json", "unet/model.safetensors"], "diffusers"),
        (["README.md"], "empty"),
        (["onnx/model.safetensors"], "empty"),
        ([], "empty"),
    ],
)
def test_layouts_are_told_apart(names: list[str], kind: str) -> None:
    assert classify(names).kind == kind


def test_what_can_be_served_passes() -> None:
    assert check_layout(spec(), DENSE).kind == "dense"
    assert check_layout(spec(), [*DENSE, *GGUF]).kind == "mixed"
    check_config(spec(), {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})


@pytest.mark.parametrize(
    ("fields", "names", "code", "facts"),
    [
        ({}, ["README.md"], "empty_repo", {"model_id": "acme/model"}),
        ({}, GGUF, "gguf_unsupported", {"gguf_quants": GGUF[1:]}),
        ({"tensor_parallel": 2}, GGUF, "tp_requires_safetensors", {"tp_size": 2, "gguf_quants": GGUF[1:]}),
        ({"tensor_split": (3, 1)}, GGUF, "tp_requires_safetensors", {"tp_size": 2}),
        ({"tensor_parallel": 2}, ["model_index.json"], "tp_requires_safetensors", {"tp_size": 2, "gguf_quants": []}),
        (
            {"quant": "q5_k_m"},
            GGUF,
            "quant_not_found",
            {"requested": "q5_k_m", "available": ["Q4_K_M", "Q6_K", "Q8_0"], "nearest": "Q4_K_M"},
        ),
        ({"quant": "q6_k"}, GGUF, "gguf_unsupported", {}),
        ({"quant": "q6k"}, DENSE, "quant_unsupported", {"requested": "q6k"}),
        ({}, ["model_index.json"], "unsupported_layout", {}),
        ({}, DENSE[1:], "bad_checkpoint", {}),
        ({}, ["config.json", "model.safetensors"], "bad_checkpoint", {}),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_facts(
    fields: dict[str, Any], names: list[str], code: str, facts: dict[str, Any]
) -> None:
    error = refused(check_layout, spec(**fields), names)
    assert error.code == code
    assert facts.items() <= error.extras.items()


def test_other_weight_formats_are_named() -> None:
    assert "pytorch_model.bin" in refused(check_layout, spec(), ["config.json", "pytorch_model.bin"]).message


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, {"model_type": None}, [], None, "text"])
def test_an_unknown_architecture_is_refused_with_what_is_known(config: Any) -> None:
    error = refused(check_config, spec(), config)
    assert error.code in ("unsupported_architecture", "bad_checkpoint")
    if isinstance(config, dict):
        assert "qwen3" in error.extras["supported"] and "qwen3" in error.message


@pytest.mark.parametrize(
    ("config", "is_served"),
    [
        ({"model_type": "qwen3"}, True),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, True),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, False),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, True),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, False),
        ({"model_type": "finetuned", "architectures": ["Qwen2ForCausalLM"]}, True),
        ({"architectures": []}, False),
        ({"model_type": None, "architectures": None}, False),
        ({}, False),
    ],
    ids=str,
)
def test_families_are_known_by_type_and_by_class(config: dict[str, Any], is_served: bool) -> None:
    if is_served:
        check_config(spec(), config)
    else:
        assert refused(check_config, spec(), config).code == "unsupported_architecture"


def test_quantised_weights_are_refused_by_method() -> None:
    error = refused(check_config, spec(), {"model_type": "qwen3", "quantization_config": {"quant_method": "awq"}})
    assert error.code == "quant_unsupported" and "awq" in error.message


def test_devices_that_do_not_exist_are_refused() -> None:
    gpu = DeviceInfo(0, "gpu", 1024)
    check_spec(spec(devices=(0,)), [gpu])
    check_spec(spec(), [])
    assert refused(check_spec, spec(devices=(0, 3)), [gpu]).extras["available"] == [0]
    assert "CPU" in refused(check_spec, spec(devices=(0,)), []).message


def test_quants_are_the_last_part_of_the_name() -> None:
    assert quant_of("folder/Model-7B-Q4_K_M.gguf") == "Q4_K_M"


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
