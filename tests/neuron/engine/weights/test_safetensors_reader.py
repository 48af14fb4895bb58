from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from neuron.checkpoint.errors import CheckpointError
from neuron.engine.weight_slices import Slices
from neuron.engine.weights.pipeline import HostTransfer, Piece, transfer_pieces
from neuron.engine.weights.safetensors_reader import CheckpointReader, bytes_per_element
from neuron.engine.weights.slices import runs_of
from safetensors.torch import save_file
from torch import Tensor

A = torch.arange(12.0).view(3, 4)
B = torch.arange(6, dtype=torch.bfloat16)
EVERYTHING = (slice(0, 3), slice(0, 4))


def read(reader: CheckpointReader, name: str, source: Slices) -> Tensor:
    info = reader.tensors[name]
    dtype = reader.dtype_of(info)
    target = torch.empty([part.stop - part.start for part in source], dtype=dtype)
    runs = tuple(runs_of(info.shape, source, offset=info.offset, item_bytes=bytes_per_element(info.dtype)))
    piece = Piece(name, reader.descriptor(info.file), runs, dtype, target)
    transfer_pieces([piece], HostTransfer(), num_threads=2, on_bytes=lambda num_bytes: None)
    return target


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "model-1.safetensors")
    save_file({"b": B}, tmp_path / "model-2.safetensors")
    index = {"metadata": {"total_size": 60}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_what_is_in_a_checkpoint(form: str, request: pytest.FixtureRequest) -> None:
    with CheckpointReader(request.getfixturevalue(form)) as reader:
        assert set(reader.tensors) == {"a", "b"}
        assert reader.tensors["a"].shape == (3, 4)
        assert reader.tensors["b"].dtype == "BF16"
        assert reader.total_bytes == 12 * 4 + 6 * 2
        assert torch.equal(read(reader, "a", EVERYTHING), A)
        assert torch.equal(read(reader, "b", (slice(0, 6),)), B)


def test_slices_are_read(single: Path) -> None:
    with CheckpointReader(single) as reader:
        assert torch.equal(read(reader, "a", (slice(1, 3), slice(0, 4))), A[1:3])
        assert torch.equal(read(reader, "a", (slice(0, 3), slice(2, 4))), A[:, 2:])
        assert torch.equal(read(reader, "b", (slice(3, 5),)), B[3:5])


def test_the_only_file_may_have_any_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    with CheckpointReader(single) as reader:
        assert set(reader.tensors) == {"a", "b"}


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        CheckpointReader(tmp_path)


def test_several_files_need_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"several safetensors files but no .*: model-1.safetensors, model-2",
    ):
        CheckpointReader(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 1 files that do not exist: model-2.safetensors"):
        CheckpointReader(sharded)


def test_a_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    save_file({"other": B}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="no shard holds: b") as caught:
        CheckpointReader(sharded)
    assert caught.value.tensors == ("b",)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    save_file({"a": A, "b": B}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"two files hold the same tensor \(model-1.* and model-2.*\): a"):
        CheckpointReader(sharded)


def test_an_index_does_not_lead_out_of_its_folder(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"outside of its folder.*: \.\./model-1"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        CheckpointReader(sharded)


def test_every_truncation_is_noticed_before_anything_is_read(single: Path) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 8, 30, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            CheckpointReader(single)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", "y"]}}',
        b"\xff\xfe\xff\xfe",
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"model.safetensors is"):
        CheckpointReader(tmp_path)


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of 4611686018427387904 bytes in a file of 10"):
        CheckpointReader(tmp_path)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=r"dtype I64 is not supported.*: a"):
        read(reader, "a", (slice(0, 4),))


def test_open_files_outlive_their_folder(single: Path) -> None:
    with CheckpointReader(single) as reader:
        (single / "model.safetensors").unlink()
        assert torch.equal(read(reader, "a", EVERYTHING), A)


def test_descriptors_take_the_place_of_files_and_are_closed(
    single: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("copy") / "copy"
    save_file({"a": A + 1, "b": B}, other)
    number = os.open(other, os.O_RDONLY)
    with CheckpointReader(single, opened={"model.safetensors": number}) as reader:
        assert torch.equal(read(reader, "a", EVERYTHING), A + 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
