"""The files of a GGUF checkpoint together."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.gguf.checkpoint import GgufCheckpoint, opened, read_checkpoint

from tests.neuron.checkpoint.gguf.writer import model_metadata, write


def read(path: Path) -> GgufCheckpoint:
    with opened(path) as descriptors:
        return read_checkpoint(path, descriptors)


def f32(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    size = 1
    for each in shape:
        size *= each
    return "F32", shape, bytes(4 * size)


def test_tensors_bear_the_names_of_the_original_and_say_how_their_rows_lie(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": f32(96, 64),
        "blk.1.attn_q.weight": ("Q4_0", (64, 64), bytes(64 * 36)),
        "blk.1.attn_k.weight": f32(32, 64),
        "blk.1.ffn_norm.weight": f32(64),
    }
    for architecture, heads in (("llama", (4, 2)), ("qwen2", (0, 0))):
        found = read(write(tmp_path / "m.gguf", model_metadata(architecture), tensors)).tensors
        assert set(found) == {
            "model.embed_tokens.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.1.post_attention_layernorm.weight",
        }
        queries = found["model.layers.1.self_attn.q_proj.weight"]
        assert (queries.header.dtype, queries.interleaved_heads) == ("Q4_0", heads[0])
        assert found["model.layers.1.self_attn.k_proj.weight"].interleaved_heads == heads[1]


def test_the_scaling_of_llama_3_is_a_tensor(tmp_path: Path) -> None:
    divisors = ("F32", (8,), struct.pack("<8f", *range(1, 9)))
    found = read(write(tmp_path / "m.gguf", model_metadata(), {"rope_freqs.weight": divisors}))
    assert found.config["rope_parameters"]["divisors"] == [1, 2, 3, 4, 5, 6, 7, 8] and not found.tensors


@pytest.mark.parametrize(
    ("file_type", "kind", "expected"),
    [(15, "Q4_0", "Q4_K_M"), (None, "Q8_0", "Q8_0"), (1, "Q8_0", "Q8_0"), (7, "F16", "F16"), (999, "F16", "F16")],
)
def test_what_it_is_called_is_what_its_makers_say_unless_that_is_plainly_untrue(
    tmp_path: Path, file_type: int | None, kind: str, expected: str
) -> None:
    sizes = {"Q4_0": 36, "Q8_0": 68, "F16": 128}
    tensor = (kind, (4, 64), bytes(4 * sizes[kind]))
    metadata: dict[str, Any] = model_metadata() | ({} if file_type is None else {"general.file_type": file_type})
    assert read(write(tmp_path / "m.gguf", metadata, {"output.weight": tensor})).quantization == expected


def splits(folder: Path, *, count: int = 2, numbers: tuple[int, ...] = (0, 1), total: int = 2) -> Path:
    first = model_metadata() | {"split.no": numbers[0], "split.count": count, "split.tensors.count": total}
    second = {"split.no": numbers[1], "split.count": count}
    write(folder / "m-00002-of-00002.gguf", second, {"output_norm.weight": f32(64)})
    return write(folder / "m-00001-of-00002.gguf", first, {"output.weight": f32(96, 64)})


def test_splits_are_one_checkpoint(tmp_path: Path) -> None:
    found = read(splits(tmp_path))
    assert found.files == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert {name: tensor.file[:7] for name, tensor in found.tensors.items()} == {
        "lm_head.weight": "m-00001",
        "model.norm.weight": "m-00002",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 3}, "split.count is 3, and its name says 2"),
        ({"numbers": (0, 0)}, "split.no is 0 where its name says 1"),
        ({"total": 5}, "split.tensors.count is 5, and the files hold 2"),
    ],
)
def test_splits_that_do_not_belong_together_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(splits(tmp_path, **wrong))


def test_a_split_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    path = splits(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError):
        read(path)


def test_tensors_that_no_model_has_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", model_metadata(), {"blk.0.ssm_a.weight": f32(4)})
    with pytest.raises(CheckpointError, match="tensors that no llama model has") as caught:
        read(path)
    assert caught.value.tensors == ("blk.0.ssm_a.weight",)
    path = write(tmp_path / "m.gguf", model_metadata(), {"blk.0.attn_q.weight": f32(60, 64)})
    with pytest.raises(CheckpointError, match="60 rows do not divide among 4 heads"):
        read(path)
