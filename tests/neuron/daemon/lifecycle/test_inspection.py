"""Checkpoints looked through in a process that may be killed for what they say."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from neuron.checkpoint.config import read_config
from neuron.checkpoint.folder import weight_paths
from neuron.checkpoint.layout import footprints, stored_tensors
from neuron.daemon.hub.download import FetchCancelled
from neuron.daemon.lifecycle import inspection
from neuron.daemon.lifecycle.inspection import inspect, inspect_in_process
from neuron.protocol import EngineConfig

from tests.neuron.checkpoint_folders import TINY, header_of, shapes_of, write_checkpoint, write_safetensors

SPEC = ModelSpec("file:/models/x")


def look(path: Path, **settings: Any) -> inspection.Inspection:
    return inspect_in_process(SPEC, path, cancelled=settings.pop("cancelled", threading.Event()), **settings)


def refused(path: Path, **settings: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        look(path, **settings)
    assert caught.value.status == 422 and caught.value.extras["kind"] == caught.value.code
    assert caught.value.extras["model_id"] == SPEC.model_id
    return caught.value


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_figures_of_a_checkpoint_come_back(tmp_path: Path, tied: bool, ranks: int) -> None:
    config = TINY | {"tie_word_embeddings": tied}
    path = write_checkpoint(tmp_path / "model", config)
    found = look(path)
    assert found == inspect(SPEC, path)
    assert found.model == read_config(config)
    assert found.weight_files == ("model.safetensors",)
    assert found.weight_bytes == (path / "model.safetensors").stat().st_size
    engine = EngineConfig(model_id="m", path=str(path), tensor_parallel_size=ranks)
    whole = stored_tensors(weight_paths(path))
    assert footprints(engine, found.model, found.tensors) == footprints(engine, found.model, whole)
    assert len(found.tensors) <= 3 < len(whole)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone").code == "repo_fetch_failed"
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").code == "repo_fetch_failed"


def test_H14_a_header_that_lies_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    header, num_bytes = header_of(shapes_of(TINY))
    header["model.norm.weight"]["data_offsets"] = [-4.0, 188.0]
    write_safetensors(path / "model.safetensors", header, num_bytes)
    error = refused(path)
    assert error.code == "bad_checkpoint" and error.extras["file"] == "model.safetensors"
    assert "`file:/models/x`: model.safetensors is damaged" in error.message and "-4.0 is not an int" in error.message


def test_H14_tensors_are_named_in_the_answer(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    header, num_bytes = header_of(shapes_of(TINY))
    header["model.norm.weight"]["dtype"] = "F33"
    write_safetensors(path / "model.safetensors", header, num_bytes)
    error = refused(path)
    assert error.extras["tensors"] == ["model.norm.weight"] and "dtype F33 is unknown" in error.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer, got 1000000000"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 3}, "lacks tensors that the model needs: model.layers.2."),
        ({"hidden_size": 64}, "another shape than config.json says"),
        ({"quantization_config": "nonsense"}, "quantised with `nonsense`"),
        ({"quantization_config": {"quant_method": ["awq"] * 10_000}}, "quantised with `"),
        ({"model_type": "q" * 10**6}, "model_type must be a name"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_H8_a_config_that_cannot_be_is_refused_before_an_engine_starts(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "config.json").write_text(json.dumps(TINY | change))
    error = refused(path)
    assert words in error.message and len(error.message) < 1_000
    assert len(json.dumps(error.extras)) < 2_000


def test_H14_names_of_tensors_do_not_break_the_answer_or_the_log(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    write_safetensors(path / "model.safetensors", {"a\nINFO forged\u202e": {"dtype": "\ud800", "shape": []}}, 0)
    error = refused(path)
    assert error.message.isprintable() and "a\\nINFO forged" in error.message
    assert all(name.isprintable() for name in error.extras["tensors"])


def test_H8_many_shards_are_refused_by_their_number(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "model.safetensors").unlink()
    for index in range(1_200):
        (path / f"model-{index}.safetensors").touch()
    weight_map = {str(index): f"model-{index}.safetensors" for index in range(1_200)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "1200 weight files, and at most 1000" in refused(path).message


# ---------------------------------------------------------------- the process


@pytest.fixture
def no_new_children() -> Iterator[None]:
    """None that this test has begun (others' modules may have some)."""
    before = children()
    yield
    assert children() - before == set()


def doing(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


@pytest.mark.usefixtures("no_new_children")
def test_H8_a_read_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """As from a disk that no longer answers."""
    error = refused(tmp_path, deadline_s=0.5, command=doing("import threading; threading.Event().wait()"))
    assert error.code == "bad_checkpoint" and "took more than 0 s" in error.message


@pytest.mark.usefixtures("no_new_children")
def test_H8_memory_has_a_limit(tmp_path: Path) -> None:
    """A header of the longest length that is read, and the worst that JSON can be decoded into."""
    path = write_checkpoint(tmp_path / "model")
    text = b'{"a":[' + b"[]," * (8 * 2**20) + b"[]]}"
    write_safetensors(path / "model.safetensors", text, 0)
    error = refused(path, memory_bytes=400 * 2**20)
    assert "took more than 400 MiB of memory" in error.message or "too much memory" in error.message


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit(7)", "ended with 7 (no word)"),
        ("import sys; sys.exit('gone')", "ended with 1 (gone)"),
        ("print('this is no reply')", "ended with 0 (no word)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "MiB of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "too much time"),
    ],
)
def test_H8_a_process_that_dies_costs_this_load(tmp_path: Path, program: str, words: str) -> None:
    assert words in refused(tmp_path, command=doing(program)).message


@pytest.mark.usefixtures("no_new_children")
def test_a_load_that_is_called_off_ends_its_process(tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(FetchCancelled):
        look(tmp_path, cancelled=cancelled, command=doing("import threading; threading.Event().wait()"))


def test_H8_checkpoints_that_hang_do_not_take_every_place_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = threading.BoundedSemaphore(1)
    monkeypatch.setattr(inspection, "_places", places)
    path = write_checkpoint(tmp_path / "model")
    with places:
        with pytest.raises(ApiError) as caught:
            look(path, deadline_s=0.1)
        assert (caught.value.status, caught.value.code) == (503, "checkpoints_busy") and caught.value.is_retryable
    assert look(path).weight_files


def test_the_process_has_none_of_our_descriptors(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    error = refused(tmp_path, command=doing("import os; raise SystemExit(len(os.listdir('/proc/self/fd')) - 1)"))
    assert "ended with 3" in error.message
    os.close(reader)
    os.close(writer)


def children() -> set[str]:
    task = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return set(task.read_text().split())
