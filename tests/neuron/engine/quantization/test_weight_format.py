"""Weight formats are strategies: one of blocks, with codes and scales of its own, is cut, loaded and multiplied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.sharding import Shard, UnsupportedSharding
from neuron.engine.gemm.activation import silu_mul
from neuron.engine.layers.linear import LinearLayer, MergedColumnParallelLinear, RowParallelLinear
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.weight_format import (
    OutputPart,
    Weights,
    bias_slices,
    blockwise_slice,
    create_bias,
)
from neuron.engine.weight_slices import WeightSlice
from neuron.engine.weights.loader import load_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.neuron.engine.checkpoints import SHAPE, write_qwen3

BLOCK = 16


class Blocks:
    """Codes of 8 bits, two to a 16-bit word, and a scale of 32 bits for each block of 16 columns."""

    def create(self, layer: Weights, *, bias: bool) -> None:
        columns = layer.in_shard
        if columns.start % BLOCK or columns.length % BLOCK:
            raise UnsupportedSharding(f"columns {columns} are cut within a block of {BLOCK}")
        codes = torch.empty(layer.out_features, columns.length // 2, dtype=torch.int16)
        layer.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
        scales = torch.empty(layer.out_features, columns.length // BLOCK)
        layer.register_parameter("scales", nn.Parameter(scales, requires_grad=False))
        layer.kept_dtypes = frozenset({"scales"})
        create_bias(layer, torch.empty(layer.out_features) if bias else None)

    def weight_slices(self, layer: Weights, part: OutputPart, row: int) -> list[WeightSlice]:
        columns = layer.in_shard
        return [
            blockwise_slice("codes", part, columns, row, per_row=2, parameter="codes", stored="I16"),
            blockwise_slice("scales", part, columns, row, per_row=BLOCK, parameter="scales", stored="F32"),
            *bias_slices(layer, part, row),
        ]

    def finish(self, layer: Weights) -> None:
        pass

    def apply(self, layer: Weights, x: Tensor) -> Tensor:
        weight = unpacked(layer.get_parameter("codes"), layer.get_parameter("scales")).to(x.dtype)
        return F.linear(x, weight, layer.bias)

    def apply_gated(self, layer: Weights, x: Tensor) -> Tensor:
        return silu_mul(self.apply(layer, x))


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.float().view(weight.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(-1) / 127
    codes = torch.round(blocks / scales[..., None]).to(torch.int8).view(weight.shape[0], -1)
    return codes.view(torch.int16), scales


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    values = codes.view(torch.int8).float().view(codes.shape[0], -1, BLOCK)
    return (values * scales[..., None]).view(codes.shape[0], -1)


def is_packed(name: str) -> bool:
    return name.endswith("down_proj.weight") or name.endswith(("gate_proj.weight", "up_proj.weight"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """The feed-forward blocks in that format, and the same values as floats."""
    plain = write_qwen3(tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in filter(is_packed, tensors):
        codes, scales = packed(stored.pop(name))
        stored |= {name.replace("weight", "codes"): codes, name.replace("weight", "scales"): scales}
        tensors[name] = unpacked(codes, scales)
    save_file(tensors, plain / "model.safetensors")
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    (blocks / "config.json").write_text(json.dumps(SHAPE))
    save_file(stored, blocks / "model.safetensors")
    return blocks, plain


def built(rank: int, world_size: int, dtype: torch.dtype, *, in_blocks: bool) -> CausalLM:
    """A model whose feed-forward layers have another format: made anew, as a family would be told to."""
    group = ParallelGroup(rank, world_size)
    model = build_model(SHAPE, device=torch.device("cpu"), dtype=dtype, parallel=group)
    for layer in model.layers if in_blocks else ():
        with torch.device("meta"):
            _in_blocks(layer.mlp, group)
        for each in (layer.mlp.gate_up_proj, layer.mlp.down_proj):
            if each.bias is not None:
                each.bias = nn.Parameter(each.bias.to(dtype), requires_grad=False)
    return model


def _in_blocks(mlp: nn.Module, group: ParallelGroup) -> None:
    gate_up, down = mlp.gate_up_proj, mlp.down_proj
    assert isinstance(gate_up, LinearLayer) and isinstance(down, LinearLayer)
    sizes = {str(part.name): part.rows for part in gate_up.parts}
    mlp.gate_up_proj = MergedColumnParallelLinear(
        gate_up.in_shard.length, sizes, bias=False, group=group, weight_format=Blocks()
    )
    mlp.down_proj = RowParallelLinear(down.in_shard, down.out_features, bias=False, group=group, weight_format=Blocks())


@pytest.mark.parametrize("world_size", [1, 2])
def test_blocks_of_all_ranks_are_those_of_the_checkpoint(checkpoints: tuple[Path, Path], world_size: int) -> None:
    blocks, plain = checkpoints
    for rank in range(world_size):
        ours, theirs = (
            built(rank, world_size, torch.float32, in_blocks=True),
            built(rank, world_size, torch.float32, in_blocks=False),
        )
        load_weights(ours, blocks)
        load_weights(theirs, plain)
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                layer = getattr(mine.mlp, name)
                weight = unpacked(layer.codes, layer.scales)
                assert torch.equal(weight, getattr(other.mlp, name).weight)
            x = torch.randn(3, 48)
            gated = mine.mlp.gate_up_proj.forward_gated(x)
            torch.testing.assert_close(gated, other.mlp.gate_up_proj.forward_gated(x))


def test_scales_keep_their_bits_in_a_model_of_fewer(checkpoints: tuple[Path, Path]) -> None:
    model = built(0, 1, torch.bfloat16, in_blocks=True)
    load_weights(model, checkpoints[0])
    layer = model.layers[0].mlp.down_proj
    assert (layer.codes.dtype, layer.scales.dtype) == (torch.int16, torch.float32)
    assert torch.equal(
        layer.scales, load_file(checkpoints[0] / "model.safetensors")["model.layers.0.mlp.down_proj.scales"]
    )
    assert model.layers[0].attention.o_proj.weight.dtype == torch.bfloat16


def test_codes_of_another_dtype_are_refused_by_name(checkpoints: tuple[Path, Path]) -> None:
    file = checkpoints[0] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.codes"
    save_file({**tensors, name: tensors[name].to(torch.int32)}, file)
    with pytest.raises(CheckpointError, match="dtype I32 where the format has I16") as refused:
        load_weights(built(0, 1, torch.float32, in_blocks=True), checkpoints[0])
    assert list(refused.value.tensors) == [name]


def test_a_cut_within_a_block_is_refused() -> None:
    with pytest.raises(UnsupportedSharding, match="within a block of 16"):
        RowParallelLinear(Shard(8, 24, 32), 4, bias=False, group=ParallelGroup.single(), weight_format=Blocks())
