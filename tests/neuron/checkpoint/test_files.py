"""Files that are no files, that are too long, or that lead elsewhere; each opened as both sides open them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from neuron.checkpoint import files
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import list_files, max_bytes, open_file, read_file, read_json, read_object, read_text


def refusal_of(path: Path) -> str:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert caught.value.file == path.name and path.name in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a socket", "a character device"])
def test_H8_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    assert refusal_of(path) == f"config.json is {kind}, and only regular files are read"


def test_H8_a_fifo_that_somebody_writes_to_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    os.write(descriptor, b"{}")
    assert "a FIFO" in refusal_of(path)
    os.close(descriptor)


def test_H8_a_circle_of_links_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("other.json")
    (tmp_path / "other.json").symlink_to("config.json")
    with pytest.raises(OSError, match=r"config\.json"):
        read_file(tmp_path / "config.json")


@pytest.mark.parametrize("target", ["/proc/self/environ", "/proc/self/cmdline", "/etc/passwd", "/proc/kmsg"])
def test_H8_links_do_not_lead_to_what_is_no_checkpoints(target: str, tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.symlink_to(target)
    if os.access(target, os.R_OK):
        assert "leads out of the checkpoint" in refusal_of(path)


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    storage = tmp_path / "models--acme--model"
    snapshot, blobs = storage / "snapshots" / "abc", storage / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "d34db33f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/d34db33f")
    assert read_file(snapshot / "config.json") == b"{}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").symlink_to(snapshot / "config.json")
    assert read_file(elsewhere / "config.json") == b"{}"
    (tmp_path / "by-link").symlink_to(snapshot)
    assert read_file(tmp_path / "by-link" / "config.json") == b"{}"


def test_links_may_lead_to_a_file_of_the_same_name_and_shards_to_any_other(tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    disk.mkdir()
    folder.mkdir()
    for name in ("config.json", "secrets.json", "other.safetensors"):
        (disk / name).write_text("{}")
    (folder / "config.json").symlink_to(disk / "config.json")
    assert read_file(folder / "config.json") == b"{}"
    (folder / "tokenizer_config.json").symlink_to(disk / "secrets.json")
    assert str(disk / "secrets.json") in refusal_of(folder / "tokenizer_config.json")
    (folder / "model.safetensors").symlink_to(disk / "other.safetensors")
    os.close(open_file(folder / "model.safetensors"))
    (folder / "model-2.safetensors").symlink_to(disk / "secrets.json")
    assert "leads out" in refusal_of(folder / "model-2.safetensors")
    (folder / "real").mkdir()
    (folder / "real" / "anything").write_text("{}")
    (folder / "generation_config.json").symlink_to("real/anything")
    assert read_file(folder / "generation_config.json") == b"{}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "x.jinja"])
def test_H8_a_file_is_read_up_to_the_limit_of_its_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.truncate(max_bytes(name) + 1)
    assert f"{max_bytes(name) + 1} bytes, and at most {max_bytes(name)}" in refusal_of(path)
    os.truncate(path, max_bytes(name))
    assert len(read_file(path)) == max_bytes(name)


def test_H8_a_file_that_does_not_say_how_long_it_is_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_leads_astray", lambda *_: False)
    with pytest.raises(CheckpointError, match="too long"):
        read_file(Path("/proc/self/maps"), limit=100)  # its size is 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e400}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_H8_what_is_no_json_is_refused_by_name(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=why) as caught:
        read_json(path)
    assert caught.value.file == "config.json" and len(caught.value.message) < 500


def test_text_is_utf_8_and_objects_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes("{{ \u00e9 }}".encode())
    assert read_text(path) == "{{ \u00e9 }}"
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8: byte 0"):
        read_text(path)
    assert read_object(tmp_path / "absent.json") == {}
    for other in ("[]", "3", "{", '{"a":' * 100_000):
        (tmp_path / "other.json").write_text(other)
        assert read_object(tmp_path / "other.json") == {}
    (tmp_path / "other.json").unlink()
    os.mkfifo(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match=r"other.json is a FIFO"):
        read_object(tmp_path / "other.json")


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "gone.json").symlink_to("nowhere")
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "model.gguf").touch()
    (tmp_path / "quants" / "deep").mkdir(parents=True)
    (tmp_path / "quants" / "deep" / "model.gguf").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "circle.json").symlink_to("circle.json")
    assert set(list_files(tmp_path)) == {
        "config.json",
        "model.safetensors",
        "quants/deep/model.gguf",
        "tokenizer.json",
        "circle.json",
        "again",
    }


def test_H8_names_that_nobody_can_write_down_are_left_out_of_listings_and_escaped_in_errors(tmp_path: Path) -> None:
    for name in (b"model-\xff.safetensors", b"line\nbreak.safetensors", b"\x1b[31m.safetensors"):
        (tmp_path / os.fsdecode(name)).touch()
    (tmp_path / "config.json").write_text("{}")
    assert list_files(tmp_path) == ["config.json"]
    error = CheckpointError("wrong", file="a\nb", tensors=["c\ud800d", "e\u202ef"])
    assert error.message == "wrong: c\\ud800d, e\\u202ef" and error.file == "a\\nb"


def test_H8_a_folder_of_very_many_files_is_not_listed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 10)
    for index in range(11):
        (tmp_path / f"model-{index}.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds more than 10 files"):
        list_files(tmp_path)
