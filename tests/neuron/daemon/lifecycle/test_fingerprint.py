"""Equal files have one digest wherever they lie; whatever answers depend on makes another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import list_files
from neuron.daemon.lifecycle.fingerprint import checkpoint_digest

from tests.neuron.checkpoint_folders import header_of, write_safetensors

NUM_ELEMENTS = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text(f"this is {name}")
    write_safetensors(folder / "model.safetensors", *header_of({"a": [NUM_ELEMENTS], "b": [NUM_ELEMENTS]}))
    return folder


def digest(folder: Path, weights: str = "model.safetensors") -> str:
    return checkpoint_digest(folder, list_files(folder), [weights])


def test_a_copy_under_other_names_has_the_same_digest(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "snapshots" / "0123"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("another one")
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    assert digest(copy, "weights.safetensors") == digest(folder)


def rewrite(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("another one")


def train(folder: Path) -> None:
    """Every number a little different, as after any training step."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for index in range(len(content) - 2 * NUM_ELEMENTS, len(content)):
        content[index] ^= 1
    path.write_bytes(content)


def rename_tensors(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", *header_of({"b": [NUM_ELEMENTS], "a": [NUM_ELEMENTS]}))


@pytest.mark.parametrize(
    "change",
    [
        rewrite("config.json"),
        rewrite("tokenizer.json"),
        rewrite("chat_template.jinja"),
        rewrite("generation_config.json"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        train,
        rename_tensors,
        lambda folder: os.truncate(folder / "model.safetensors", 2**20),
    ],
)
def test_what_answers_depend_on_makes_another(folder: Path, change: Callable[[Path], object]) -> None:
    before = digest(folder)
    change(folder)
    assert digest(folder) != before


def test_of_weights_only_samples_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal num_read
        data = pread(descriptor, length, offset)
        num_read += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    digest(folder)
    assert 64 * 4096 <= num_read <= 64 * 4096 + 1024 < (folder / "model.safetensors").stat().st_size


def test_a_fifo_in_the_place_of_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError):
        digest(folder)


def test_a_file_that_is_shorter_than_a_header_has_a_digest(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"abc")
    assert len(digest(folder)) == 32
