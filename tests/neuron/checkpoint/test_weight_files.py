from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from neuron.checkpoint import weight_files
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import INDEX_FILE
from neuron.checkpoint.weight_files import files_of, headers_of, merge, read_index, select

from tests.neuron.checkpoint_folders import header_of, write_safetensors

DENSE = ["config.json", "tokenizer.json", "model.safetensors"]


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX_FILE).write_text(index if isinstance(index, str) else json.dumps(index))


def write_shard(folder: Path, name: str, *tensors: str) -> None:
    write_safetensors(folder / name, *header_of({tensor: [2] for tensor in tensors}))


def test_weights_are_those_of_the_index_else_the_single_file_else_the_only_one() -> None:
    names = ["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "onnx/model.safetensors"]
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors"}
    assert select(names, weight_map) == ("model-1.safetensors", "model-2.safetensors")
    assert select([*DENSE, "consolidated.safetensors"], None) == ("model.safetensors",)
    assert select(["config.json", "weights.safetensors"], None) == ("weights.safetensors",)


@pytest.mark.parametrize(
    ("names", "weight_map", "words"),
    [
        (["b.safetensors", "a.safetensors"], None, r"several safetensors files but no .*: a\.safetensors, b\.saf"),
        (["config.json", "onnx/model.safetensors"], None, "no safetensors file"),
        (DENSE, {}, "names no shards"),
        (DENSE, {"a": "model-1.safetensors"}, r"names 1 files that do not exist: model-1\.safetensors"),
        (DENSE, {"a": "../model.safetensors"}, r"outside of its folder.*: \.\./model\.safetensors"),
        (DENSE, {"a": "/etc/passwd"}, "outside of its folder.*: /etc/passwd"),
        (DENSE, {"a": "config.json"}, r"or of another kind: config\.json"),
        (DENSE, {"a": "m\0.safetensors"}, "outside of its folder"),
        (DENSE, {str(i): f"{i}.safetensors" for i in range(10**5)}, "names 100000 files that do not exist: 0.saf"),
        (
            [f"{i}.safetensors" for i in range(2_000)],
            {str(i): f"{i}.safetensors" for i in range(2_000)},
            "2000 weight files, and at most 1000 are read",
        ),
    ],
    ids=str,
)
def test_H14_an_index_that_lies_is_refused_by_name(
    names: list[str], weight_map: dict[str, str] | None, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        select(names, weight_map)
    assert len(caught.value.message) < 2_000


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", {"weight_map": 3}, {"weight_map": []}, {"weight_map": {"a": 7}}, '{"weight_map": {"a":']
)
def test_H14_what_is_no_index_is_refused_by_name(tmp_path: Path, index: Any) -> None:
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match="index") as caught:
        read_index(tmp_path)
    assert caught.value.file == INDEX_FILE


def test_a_folder_need_not_have_an_index_but_one_that_leads_nowhere_is_missed(tmp_path: Path) -> None:
    assert read_index(tmp_path) is None
    (tmp_path / INDEX_FILE).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path)


def test_shards_hold_each_tensor_once_and_all_that_the_index_promises(tmp_path: Path) -> None:
    def tensors() -> set[str]:
        files, weight_map = files_of(tmp_path)
        return set(merge(headers_of(tmp_path, files), weight_map))

    write_shard(tmp_path, "1.safetensors", "a")
    write_shard(tmp_path, "2.safetensors", "b")
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    assert tensors() == {"a", "b"}
    write_shard(tmp_path, "2.safetensors", "a", "b")
    with pytest.raises(CheckpointError, match=r"two files hold the same tensor \(1.safetensors and 2.safetensors\): a"):
        tensors()
    write_shard(tmp_path, "2.safetensors", "c")
    with pytest.raises(CheckpointError, match="names tensors that no shard holds: b"):
        tensors()


def test_one_shard_is_open_at_a_time(tmp_path: Path) -> None:
    names = [f"{index}.safetensors" for index in range(20)]
    for name in names:
        write_shard(tmp_path, name, name)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in headers_of(tmp_path, names):
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_H14_tensors_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MAX_TENSORS", 3)
    write_shard(tmp_path, "model.safetensors", "a", "b", "c", "d")
    with pytest.raises(CheckpointError, match="4 tensors, and at most 3 are read"):
        merge(headers_of(tmp_path, ["model.safetensors"]), None)
