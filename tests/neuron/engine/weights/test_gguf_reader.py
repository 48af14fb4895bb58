"""Models from GGUF files: the numbers of the same weights dequantised, held in blocks or not, whole or in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from neuron.checkpoint import layout
from neuron.checkpoint.errors import CheckpointError
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.loading.loading import load_engine, read_hf_config
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weights import loader
from neuron.engine.weights.gguf_reader import GgufReader, open_checkpoint
from neuron.engine.weights.loader import load_weights
from neuron.engine.weights.safetensors_reader import CheckpointReader
from neuron.protocol import EngineConfig

from tests.native import NATIVE
from tests.neuron.checkpoint.gguf.writer import model_metadata, write
from tests.neuron.engine.toy import request, run
from tests.neuron.engine.weights.gguf_models import HIDDEN, VOCAB, write_pair

BLOCKS = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "Q5_1", "Q4_1", "Q5_0")


def loaded(path: Path, *, native: bool, group: ParallelGroup | None = None) -> CausalLM:
    config = read_hf_config(path)
    model = build_model(config, device=torch.device("cpu"), dtype=torch.float32, parallel=group, native=native)
    load_weights(model, path)
    return model


def answers(path: Path) -> tuple[dict[int, list[int]], int]:
    config = EngineConfig(model_id="m", path=str(path), num_threads=1, kv_cache_tokens=1024, dtype="float32")
    engine, figures = load_engine(config)
    return run(engine, request(0, range(30), 10), request(1, range(60, 77), 10)).tokens, figures.weight_bytes


@pytest.mark.parametrize("native", [NATIVE, False])
@pytest.mark.parametrize(
    ("model_type", "kinds", "tied"),
    [
        ("llama", BLOCKS, False),
        ("qwen2", ("Q8_0", "Q4_K", "F16"), True),
        ("qwen3", ("Q6_K", "Q4_K"), True),
        ("llama", ("BF16", "F32"), False),
    ],
)
def test_answers_are_those_of_the_dequantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, kinds: tuple[str, ...], tied: bool, native: bool
) -> None:
    monkeypatch.setattr(layout, "has_native_kernels", lambda: native)
    folder, file = write_pair(tmp_path / "m", model_type, kinds=kinds, tied=tied)
    expected, plain_bytes = answers(folder)
    found, held_bytes = answers(file)
    assert found == expected
    if native and kinds == BLOCKS:
        assert held_bytes < 1.1 * file.stat().st_size < 0.3 * plain_bytes, "as it is stored"


def test_without_the_kernels_parameters_are_the_dequantised_ones(tmp_path: Path) -> None:
    folder, file = write_pair(tmp_path / "m", "llama", kinds=BLOCKS)
    expected = dict(loaded(folder, native=False).named_parameters())
    found = dict(loaded(file, native=False).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("native", [NATIVE, False])
@pytest.mark.parametrize("shares", [(), (1, 3)])
def test_ranks_hold_their_parts_of_blocks(tmp_path: Path, native: bool, shares: tuple[int, ...]) -> None:
    """Columns of a down projection are cut within a super-block of 256, where shares are uneven."""
    folder, file = write_pair(tmp_path / "m", "llama", kinds=("Q4_K", "Q6_K"))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    for rank in range(2):
        group = ParallelGroup(rank, 2, shares=shares)
        ours, theirs = (loaded(path, native=native, group=group) for path in (file, folder))
        for name, layer in theirs.named_modules():
            if isinstance(layer, LinearLayer):
                other = ours.get_submodule(name)
                assert isinstance(other, LinearLayer)
                part = x[:, : layer.in_shard.length]
                # Only this rank's part: no sums over ranks here.
                assert torch.equal(other.weight_format.apply(other, part), layer.weight_format.apply(layer, part))


def test_what_is_read_at_once_is_no_more_than_a_block_of_the_ring(tmp_path: Path) -> None:
    """A matrix is never a float copy as a whole: it is decoded piece by piece."""
    _, file = write_pair(tmp_path / "m", "llama", kinds=("Q4_K",))
    model = build_model(read_hf_config(file), device=torch.device("cpu"), dtype=torch.float32)
    with GgufReader(file) as reader:
        for read in loader._plan(model, reader):
            pieces = list(loader._pieces(model, reader, read, 4096))
            one_row = max(piece.num_bytes for piece in pieces)
            rows_of_a_head = 64 if read.info.interleaved_heads else 1
            row_bytes = read.info.num_bytes // read.info.shape[0]
            assert one_row <= max(4096, rows_of_a_head * row_bytes)
            assert sum(piece.num_bytes for piece in pieces) == read.info.num_bytes


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    row = 2 * 66
    path = write(tmp_path / "m.gguf", model_metadata(), {"output.weight": ("IQ2_XXS", (96, 512), bytes(96 * row))})
    with GgufReader(path) as reader, pytest.raises(CheckpointError, match="type IQ2_XXS is not supported") as caught:
        reader.dtype_of(reader.tensors["lm_head.weight"])
    assert caught.value.file == "m.gguf" and caught.value.tensors == ("lm_head.weight",)


def test_the_reader_is_that_of_the_path(tmp_path: Path) -> None:
    folder, file = write_pair(tmp_path / "m", "qwen3", kinds=("Q8_0",))
    with open_checkpoint(file) as ours, open_checkpoint(folder) as theirs:
        assert isinstance(ours, GgufReader) and isinstance(theirs, CheckpointReader)
        assert ours.tensors.keys() == theirs.tensors.keys()
        info = ours.tensors["lm_head.weight"]
        assert (info.dtype, info.shape) == ("Q8_0", (VOCAB, HIDDEN))
        with pytest.raises(CheckpointError, match="type Q8_0 where Q4_K was expected"):
            ours.dtype_of(info, stored="Q4_K")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufReader(tmp_path / "gone.gguf")
