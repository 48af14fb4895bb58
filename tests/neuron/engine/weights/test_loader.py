from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron.checkpoint.errors import CheckpointError
from neuron.engine.errors import ModelError
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weights import materialise
from neuron.engine.weights.loader import load_dummy_weights, load_weights
from neuron.engine.weights.pipeline import HostTransfer
from safetensors.torch import save_file
from torch import Tensor

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def model_of(dtype: torch.dtype = torch.float32, parallel: ParallelGroup | None = None, **changes: Any) -> CausalLM:
    return build_model(CONFIG | changes, device=CPU, dtype=dtype, parallel=parallel)


def tensors_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "model.embed_tokens.weight": random(11, 8),
        "model.norm.weight": random(8),
        "lm_head.weight": random(11, 8),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": random(8),
            f"{prefix}.self_attn.q_proj.weight": random(8, 8),
            f"{prefix}.self_attn.k_proj.weight": random(4, 8),
            f"{prefix}.self_attn.v_proj.weight": random(4, 8),
            f"{prefix}.self_attn.o_proj.weight": random(8, 8),
            f"{prefix}.self_attn.q_norm.weight": random(4),
            f"{prefix}.self_attn.k_norm.weight": random(4),
            f"{prefix}.post_attention_layernorm.weight": random(8),
            f"{prefix}.mlp.gate_proj.weight": random(12, 8),
            f"{prefix}.mlp.up_proj.weight": random(12, 8),
            f"{prefix}.mlp.down_proj.weight": random(8, 12),
        }
    return tensors


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def test_tensors_land_in_their_slices(tmp_path: Path) -> None:
    tensors = tensors_of()
    model = model_of()
    load_weights(model, save(tmp_path, tensors))
    assert not any(parameter.is_meta for parameter in model.parameters())
    qkv = model.get_parameter("layers.1.attention.qkv_proj.weight")
    prefix = "model.layers.1.self_attn"
    assert torch.equal(qkv, torch.cat([tensors[f"{prefix}.{name}_proj.weight"] for name in "qkv"]))
    gate_up = model.get_parameter("layers.0.mlp.gate_up_proj.weight")
    assert torch.equal(
        gate_up, torch.cat([tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    )
    assert torch.equal(model.get_parameter("lm_head.matrix.weight"), tensors["lm_head.weight"])
    assert torch.equal(
        model.get_parameter("layers.0.attention.qk_norm.k"), tensors["model.layers.0.self_attn.k_norm.weight"]
    )


def test_half_precision_checkpoints_run_in_float32(tmp_path: Path) -> None:
    model = model_of()
    tensors = tensors_of(torch.bfloat16)
    load_weights(model, save(tmp_path, tensors))
    weight = model.get_parameter("norm.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["model.norm.weight"].float())


def test_progress_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    tensors = tensors_of(torch.bfloat16)
    reports: list[tuple[int, int]] = []
    load_weights(model_of(), save(tmp_path, tensors), progress=lambda done, total: reports.append((done, total)))
    total = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert len(reports) == len(tensors) + 1


def test_N5_a_rank_reads_its_part_only(tmp_path: Path) -> None:
    tensors = tensors_of()
    save(tmp_path, tensors)
    sizes = []
    for rank in range(2):
        model = model_of(parallel=ParallelGroup(rank, 2))
        reports: list[int] = []
        load_weights(model, tmp_path, progress=lambda done, total, reports=reports: reports.append(total))  # type: ignore[misc]
        sizes.append(reports[0])
        query = tensors["model.layers.0.self_attn.q_proj.weight"][rank * 4 : rank * 4 + 4]
        assert torch.equal(model.get_parameter("layers.0.attention.qkv_proj.weight")[:4], query)
        down = tensors["model.layers.0.mlp.down_proj.weight"][:, rank * 6 : rank * 6 + 6]
        assert torch.equal(model.get_parameter("layers.0.mlp.down_proj.weight"), down)
        table = model.get_parameter("embed_tokens.weight")
        rows = tensors["model.embed_tokens.weight"][rank * 6 : rank * 6 + 6]
        assert torch.equal(table[: len(rows)], rows)
        assert not table[len(rows) :].any()
    assert max(sizes) < 0.7 * sum(tensor.numel() * 4 for tensor in tensors.values())


def test_a_tied_head_takes_the_embedding_and_ignores_a_second_copy(tmp_path: Path) -> None:
    tensors = tensors_of()
    hidden = torch.randn(2, 8)
    for stored in (tensors, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}):
        model = model_of(tie_word_embeddings=True)
        load_weights(model, save(tmp_path, stored))
        torch.testing.assert_close(model.compute_logits(hidden), hidden @ tensors["model.embed_tokens.weight"].t())


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_N2_a_language_model_inside_of_a_multimodal_one(tmp_path: Path, prefix: str) -> None:
    """N2: the text weights sit under another prefix, the vision tower beside them."""
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
    renamed = {
        head if name == "lm_head.weight" else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors_of().items()
    }
    renamed["model.visual.patch_embed.weight"] = torch.zeros(2, 2)
    renamed["mtp.layers.0.weight"] = torch.zeros(2)
    model = model_of()
    load_weights(model, save(tmp_path, renamed))
    assert torch.equal(model.get_parameter("norm.weight"), tensors_of()["model.norm.weight"])


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = tensors_of()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match="lacks tensors") as caught:
        load_weights(model_of(), save(tmp_path, tensors))
    assert set(caught.value.tensors) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    assert caught.value.kind == "bad_checkpoint"


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    tensors = tensors_of()
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head.weight"):
        load_weights(model_of(), save(tmp_path, tensors))


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    tensors = tensors_of() | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # older checkpoints carry it
    with pytest.raises(CheckpointError, match=r"does not know: model.layers.0.self_attn.q_proj.bias") as caught:
        load_weights(model_of(), save(tmp_path, tensors))
    assert caught.value.tensors == ("model.layers.0.self_attn.q_proj.bias",)


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="and 17 more") as caught:
        load_weights(model_of(), save(tmp_path, {"x": torch.zeros(1)}))
    assert len(caught.value.tensors) == 25


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(8, 13)
    with pytest.raises(CheckpointError, match=r"down_proj.weight \[8, 13\] \(expected \[8, 12\]\)"):
        load_weights(model_of(), save(tmp_path, tensors))


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["model.norm.weight"] = torch.zeros(8, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="dtype I8 is not supported"):
        load_weights(model_of(), save(tmp_path, tensors))


@pytest.mark.parametrize("parallel", [None, ParallelGroup(0, 2)])
def test_a_file_that_shrinks_after_it_was_checked_is_named(tmp_path: Path, parallel: ParallelGroup | None) -> None:
    save(tmp_path, tensors_of())
    file = tmp_path / "model.safetensors"
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=r"it has become shorter\): .* of model.safetensors"):
        load_weights(model_of(parallel=parallel), tmp_path, progress=lambda done, total: os.truncate(file, 2000))
    assert threading.active_count() == before


def test_a_file_that_is_replaced_while_it_is_read_does_not_matter(tmp_path: Path) -> None:
    file = save(tmp_path, tensors_of()) / "model.safetensors"

    def replace(done: int, total: int) -> None:
        file.unlink(missing_ok=True)
        file.write_bytes(b"something else")

    model = model_of()
    load_weights(model, tmp_path, progress=replace)
    assert torch.equal(model.get_parameter("norm.weight"), tensors_of()["model.norm.weight"])


def test_large_matrices_are_read_in_pieces(tmp_path: Path) -> None:
    class Small(HostTransfer):
        block_bytes = 48

    tensors, reports = tensors_of(torch.bfloat16), list[int]()
    save(tmp_path, tensors)
    for parallel in (None, ParallelGroup(1, 2)):
        model, usual = model_of(parallel=parallel), model_of(parallel=parallel)
        load_weights(model, tmp_path, transfer=Small(), progress=lambda done, total: reports.append(done))
        load_weights(usual, tmp_path)
        for (name, ours), theirs in zip(model.named_parameters(), usual.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert len(reports) > 2 * len(tensors)


def test_no_memory_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*shape: object, **options: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    model, path = model_of(), save(tmp_path, tensors_of())
    monkeypatch.setattr(materialise.torch, "empty", no_memory)
    with pytest.raises(ModelError, match=r"no memory for .* bytes of weights") as caught:
        load_weights(model, path)
    assert caught.value.kind == "out_of_memory"


@pytest.mark.parametrize(
    ("features", "expected"), [("011001010000", True), ("011000010000", False), ("0110", False), (None, False)]
)
def test_large_pages_are_not_asked_for_where_free_memory_goes_back_to_a_host(
    tmp_path: Path, features: str | None, expected: bool
) -> None:
    if features is not None:
        (tmp_path / "virtio0").mkdir()
        (tmp_path / "virtio0" / "features").write_text(features + "\n")
    assert materialise.gives_free_memory_back(tmp_path) is expected


def test_a_name_map_with_a_hole_is_a_bug_and_not_a_bad_checkpoint(tmp_path: Path) -> None:
    model = model_of()
    names = {name: ours for name, ours in model.checkpoint_names.items() if not name.endswith("up_proj")}
    model.checkpoint_names = names
    tensors = {name: tensor for name, tensor in tensors_of().items() if "up_proj" not in name}
    with pytest.raises(RuntimeError, match=r"fills 96 of 192 elements of layers.0.mlp.gate_up_proj.weight"):
        load_weights(model, save(tmp_path, tensors))


def test_a_checkpoint_of_another_size_than_its_config_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"lacks tensors that the model needs: model.layers.2"):
        load_weights(model_of(num_hidden_layers=3), save(tmp_path, tensors_of()))


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    first, second, other = model_of(), model_of(), model_of()
    load_dummy_weights(first, seed=1)
    load_dummy_weights(second, seed=1)
    load_dummy_weights(other, seed=2)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert not a.is_meta
        assert torch.equal(a, b)
        if "norm" in name:
            assert torch.equal(a, torch.ones_like(a))
        else:
            assert 0.01 < a.std() < 0.03
            assert not torch.equal(a, c)


@pytest.mark.parametrize("shares", [(), (1, 2)])
def test_dummy_weights_of_ranks_are_parts_of_those_of_one(shares: tuple[int, ...]) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    whole = model_of(**sizes)
    load_dummy_weights(whole, seed=3)
    for rank in range(2):
        part = model_of(parallel=ParallelGroup(rank, 2, shares=shares), **sizes)
        load_dummy_weights(part, seed=3)
        for (name, ours, fused), (_, theirs, _) in zip(
            part.checkpoint_modules(), whole.checkpoint_modules(), strict=True
        ):
            for own, all_of_it in zip(ours.weight_slices(fused), theirs.weight_slices(fused), strict=True):
                if not any(piece.start == piece.stop for piece in own.source):
                    expected = getattr(theirs, all_of_it.parameter)[all_of_it.target][own.source]
                    assert torch.equal(getattr(ours, own.parameter)[own.target], expected), name
