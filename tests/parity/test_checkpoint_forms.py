"""The same model in the forms that its files come in: older configs, nested configs, shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.checkpoints import VARIANTS, Oracle, Variant, save_checkpoint
from tests.parity.paged_model import PagedModel, load

TOKENS = [7, 1, 190, 44, 3, 3, 60, 12, 101, 5, 88]
BY_NAME = {variant.name: variant for variant in VARIANTS}


def rewrite_config(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def assert_same_logits(path: Path, oracle: Oracle) -> None:
    _, logits = PagedModel(load(path)).prefill(TOKENS)
    torch.testing.assert_close(logits, oracle.logits(TOKENS), atol=1e-4, rtol=0)


def to_older_form(hf: dict[str, Any]) -> dict[str, Any]:
    """Before transformers 5: `rope_theta` and `rope_scaling` with the key `type`, `torch_dtype`."""
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    hf["rope_scaling"] = None if rope["type"] == "default" else rope
    hf["torch_dtype"] = hf.pop("dtype")
    return hf


@pytest.mark.parametrize("name", ["qwen3-tied", "llama3-rope-gqa", "llama-linear-rope-biases", "qwen2-yarn"])
def test_configs_of_older_versions(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(BY_NAME[name], tmp_path)
    oracle = Oracle(path)
    rewrite_config(path, to_older_form)
    assert_same_logits(path, oracle)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_language_model_wrapped_by_a_multimodal_one(prefix: str, tmp_path: Path) -> None:
    """N1 and N2: hyperparameters under `text_config`, weights under a prefix, a vision tower beside them."""
    path = save_checkpoint(BY_NAME["mistral-window"], tmp_path)
    oracle = Oracle(path)
    rewrite_config(
        path,
        lambda hf: {
            "model_type": "mistral3",
            "architectures": ["Mistral3ForConditionalGeneration"],
            "vision_config": {"hidden_size": 8},
            "text_config": {key: value for key, value in hf.items() if key != "architectures"},
        },
    )
    tensors = load_file(path / "model.safetensors")
    wrapped = {
        ("language_model." + name if prefix.startswith("language") else name)
        if name.startswith("lm_head")
        else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    wrapped["vision_tower.patch_conv.weight"] = torch.zeros(3)
    save_file(wrapped, path / "model.safetensors")
    assert_same_logits(path, oracle)


def test_shards_with_an_index(tmp_path: Path) -> None:
    path = save_checkpoint(BY_NAME["qwen3-tied"], tmp_path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_same_logits(path, Oracle(path))


def test_a_base_model_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    """Without its `model.` prefix and head (an embedding model, say) nothing fits, and the error names it."""
    path = save_checkpoint(BY_NAME["qwen2-mha-untied"], tmp_path)
    tensors = load_file(path / "model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(base, path / "model.safetensors")
    with pytest.raises(Exception, match=r"lacks tensors that the model needs: model\.embed_tokens\.weight"):
        load(path)


LONG = [
    BY_NAME["qwen3-wide-heads-mqa"],
    Variant(
        "qwen2-window-100",
        BY_NAME["qwen2-tied"].config_class,
        {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
    ),
    Variant("mistral-window-300", BY_NAME["mistral-window"].config_class, {"sliding_window": 300}),
]


@pytest.mark.parametrize("variant", LONG, ids=lambda variant: variant.name)
def test_prompts_of_several_hundred_tokens(variant: Variant, tmp_path: Path) -> None:
    """Longer than a tile of rows, than the windows and than the first rotary table would be in small."""
    path = save_checkpoint(variant, tmp_path)
    tokens = [(37 * i * i + 11 * i) % 199 for i in range(700)]
    expected = Oracle(path).logits(tokens)
    model = PagedModel(load(path), page_size=16)
    for chunk in (700, 330):
        sequence, logits = model.prefill(tokens[:690], chunk=chunk)
        torch.testing.assert_close(logits, expected[:690], atol=1e-4, rtol=0)
        decoded = [model.step([(sequence, [token])], num_decodes=1)[0] for token in tokens[690:]]
        torch.testing.assert_close(torch.cat(decoded), expected[690:], atol=1e-4, rtol=0)
