"""The list of what is served, as a file that anything may happen to."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import NeuronConfig
from neuron.daemon.lifecycle.state_file import MAX_STARTS, ServedModels
from neuron.daemon.server import state_path

A, B = ModelSpec("acme/a", max_model_len=1024), ModelSpec("acme/b")


def served(path: Path, *, configured: tuple[str, ...] = ()) -> ServedModels:
    return ServedModels(path, id_of=lambda text: text, configured=configured)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "served-13131.json"


def left_behind(before: ServedModels) -> None:
    """What a daemon that is killed does: its lock is gone and nothing else happens."""
    before._release()


async def test_what_was_loaded_comes_back_in_order_with_its_spec(path: Path) -> None:
    before = served(path)
    assert before.open() == ()
    before.add("acme/b", B)
    before.add("acme/a", A)
    await before.flushed()
    left_behind(before)
    assert served(path).open() == (B, A)


async def test_an_unload_takes_a_model_off_and_an_orderly_end_does_not(path: Path) -> None:
    before = served(path)
    before.open()
    before.add("acme/a", A)
    before.add("acme/b", B)
    before.remove("acme/a")
    await before.close()
    after = served(path)
    assert after.open() == (B,)
    await after.close()
    assert served(path).open() == (B,)


async def test_what_the_configuration_lists_is_its_business(path: Path) -> None:
    before = served(path)
    before.open()
    before.add("acme/a", A)
    before.add("acme/b", B)
    await before.close()
    after = served(path, configured=("acme/a",))
    assert after.open() == (B,)
    after.add("acme/a", A)
    await after.close()
    assert served(path).open() == (B,), "taken out of the configuration, it is gone"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\x00" * 4096, b"[]", b'{"models": 7}', b'{"version": 99, "models": []}', b'{"models": [{"a": 1}]}'],
)
async def test_a_damaged_file_is_put_aside(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    after = served(path)
    assert after.open() == ()
    assert path.with_suffix(".damaged").read_bytes() == damage
    after.add("acme/a", A)
    await after.close()
    assert served(path).open() == (A,)


async def test_H3_a_list_that_cannot_be_read_is_put_aside_and_waited_for_by_nobody(path: Path) -> None:
    """What one daemon could not read is not overwritten by its next list."""
    path.parent.mkdir()
    for put in (path.mkdir, partial(os.mkfifo, path), partial(path.symlink_to, path.name)):
        put()
        after = served(path)
        async with asyncio.timeout(20):
            assert await asyncio.to_thread(after.open) == ()
        after.add("acme/a", A)
        await after.close()
        last = served(path)
        assert last.open() == (A,)
        left_behind(last)
        aside = path.with_suffix(".damaged")
        assert aside.is_symlink() or aside.exists()
        path.unlink()
        if aside.is_dir():
            aside.rmdir()


async def test_a_write_that_was_cut_short_leaves_the_old_list(path: Path) -> None:
    before = served(path)
    before.open()
    before.add("acme/a", A)
    await before.close()
    path.with_suffix(".new").write_bytes(b'{"models": [{"model_')
    assert served(path).open() == (A,)


async def test_unknown_fields_of_a_later_release_are_no_damage(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"version": 1, "models": [{"model_id": "acme/b", "new": 1}], "more": {}}))
    assert served(path).open() == (B,)


async def test_H7_ends_in_the_middle_of_a_load_make_the_next_one_wait_longer_but_not_for_ever(path: Path) -> None:
    before = served(path)
    before.open()
    before.add("acme/a", A)
    await before.flushed()
    left_behind(before)
    pauses = []
    for _ in range(MAX_STARTS + 8):
        life = served(path)
        assert life.open() == (A,)
        pauses.append(life.pause_s(A))
        begun = asyncio.Event()

        async def deadly(spec: ModelSpec, begun: asyncio.Event = begun) -> None:
            begun.set()
            await asyncio.Event().wait()

        loading = asyncio.create_task(life.load(A, deadly))
        await begun.wait()
        left_behind(life)  # killed in the middle of it
        life._path = None
        loading.cancel()
    assert pauses[:MAX_STARTS] == [0.0] * MAX_STARTS
    assert pauses[MAX_STARTS:] == [60.0, 120.0, 240.0, 480.0, 960.0, 1800.0, 1800.0, 1800.0]
    life = served(path)
    life.open()
    assert "11 times in a row while it loaded `acme/a`" in life.fault(A)
    life.add("acme/a", A)  # somebody loaded it by hand
    assert life.pause_s(A) == 0.0
    await life.close()


async def test_H7_a_daemon_that_is_killed_while_its_model_serves_blames_no_load(path: Path) -> None:
    before = served(path)
    before.open()
    before.add("acme/a", A)
    await before.flushed()
    left_behind(before)
    for _ in range(3 * MAX_STARTS):
        life = served(path)
        assert life.open() == (A,) and life.pause_s(A) == 0.0

        async def fine(spec: ModelSpec, life: ServedModels = life) -> None:
            life.add("acme/a", A)

        await life.load(A, fine)
        left_behind(life)  # killed right behind it


async def test_what_was_unloaded_during_its_pause_is_not_loaded_behind_it(path: Path) -> None:
    life = served(path)
    life.open()
    life.add("acme/a", A)
    life.remove("acme/a")

    async def never(spec: ModelSpec) -> None:
        raise AssertionError

    await life.load(A, never)
    await life.close()


async def test_a_load_that_fails_or_is_ended_in_order_is_not_held_against_the_model(path: Path) -> None:
    life = served(path, configured=("acme/a",))
    life.open()

    async def failing(spec: ModelSpec) -> None:
        raise ApiError("internal", "broken", code="load_failed")

    for _ in range(MAX_STARTS + 2):
        with pytest.raises(ApiError, match="broken"):
            await life.load(A, failing)
    loading = asyncio.create_task(life.load(A, lambda spec: asyncio.Event().wait()))
    await asyncio.sleep(0)
    loading.cancel()
    await asyncio.wait((loading,))
    await life.close()
    assert json.loads(path.read_text())["starts"] == {}


async def test_a_second_daemon_leaves_the_list_of_the_first_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = served(path)
    first.open()
    first.add("acme/a", A)
    await first.flushed()
    second = served(path)
    assert second.open() == () and "not remembered" in caplog.text
    second.add("acme/b", B)
    await second.close()
    await first.close()
    assert served(path).open() == (A,)


async def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    life = served(tmp_path / "file" / "served.json")
    assert life.open() == () and "not remembered" in caplog.text
    life.add("acme/a", A)
    await life.flushed()
    await life.close()


async def test_a_disk_that_is_full_costs_only_the_memory(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    life = served(path)
    life.open()
    life.add("acme/a", A)
    await life.flushed()
    path.with_suffix(".new").symlink_to("/dev/full")  # every write says ENOSPC
    life.add("acme/b", B)
    await life.flushed()
    assert "No space left" in caplog.text
    path.with_suffix(".new").unlink()
    left_behind(life)
    assert served(path).open() == (A,)


def test_where_the_list_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert state_path(NeuronConfig()) == Path("/home/x/.local/state/neuron/served-13131.json")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_path(NeuronConfig(port=7)) == Path("/state/neuron/served-7.json")
    monkeypatch.setenv("STATE_DIRECTORY", f"/var/lib/neuron{os.pathsep}/other")
    assert state_path(NeuronConfig()) == Path("/var/lib/neuron/served-13131.json")
    assert state_path(NeuronConfig(port=0)) is None
    assert state_path(NeuronConfig(port=0, state_dir="/s")) == Path("/s/served-0.json")
    assert state_path(NeuronConfig(state_dir="")) is None
