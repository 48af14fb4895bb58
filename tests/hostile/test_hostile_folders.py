"""Hostile checkpoint folders, loaded into a neuron that serves: it refuses them by name, or they serve, and the model
that was there before notices nothing.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import Neuron, eventually
from tests.hostile.folders import HOSTILE, Hostile, build
from tests.hostile.harness import QUESTION, Good

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

REFUSED = [hostile for hostile in HOSTILE if hostile.refused is not None]
ODD = [hostile for hostile in HOSTILE if hostile.refused is None and hostile.asked is None]
ASKED = [hostile for hostile in HOSTILE if hostile.asked is not None]


def one_of_each_kind(folders: list[Hostile]) -> list[Any]:
    """The first of each kind, and where everything is asked for, the others alone as well: all are loaded at once."""
    seen: set[str] = set()
    params = []
    for hostile in folders:
        marks = [pytest.mark.full] if hostile.kind in seen else []
        seen.add(hostile.kind)
        params.append(pytest.param(hostile, marks=marks, id=hostile.name.replace(" ", "-")))
    return params


def assert_refused(hostile: Hostile, status: int, answer: dict[str, Any]) -> None:
    assert status == 422, (hostile.name, answer)
    error = answer["error"]
    assert hostile.refused is not None and hostile.refused in error["message"], (hostile.name, error)
    assert error["kind"] == error["code"] and error["code"] in (
        *("bad_checkpoint", "repo_fetch_failed", "empty_repo", "quant_unsupported", "unsupported_architecture"),
    )
    assert len(str(answer)) < 4_000


async def load(neuron: Neuron, folder: Path) -> tuple[int, dict[str, Any]]:
    status, answer = await neuron.call("POST", "/models/load", {"model_id": f"file:{folder}", "max_model_len": 2048})
    return status, answer


def of_the_load(neuron: Neuron, folder: Path) -> list[str]:
    """Lines of the log that say a process of the engine was started for this folder."""
    return [line for line in neuron.log.splitlines() if "engine started" in line and str(folder) in line]


@pytest.mark.parametrize("hostile", one_of_each_kind(REFUSED))
async def test_H8_a_hostile_folder_is_refused_and_nobody_else_notices(
    good: Good, neuron: Neuron, tmp_path: Path, hostile: Hostile
) -> None:
    folder = build(hostile, tmp_path)
    async with good.asked_meanwhile():
        status, answer = await load(neuron, folder)
    assert_refused(hostile, status, answer)
    assert not of_the_load(neuron, folder), "it was known before an engine started"


@pytest.mark.parametrize("hostile", one_of_each_kind(ODD))
async def test_H8_a_folder_that_is_merely_odd_serves(
    good: Good, neuron: Neuron, tmp_path: Path, hostile: Hostile
) -> None:
    folder = build(hostile, tmp_path)
    async with good.asked_meanwhile():
        status, answer = await load(neuron, folder)
        assert status == 200, answer
        said = await neuron.ask({**QUESTION, "model": f"file:{folder}", "max_tokens": 8}, stream=False)
        assert said.status == 200, said
        await neuron.unload(f"file:{folder}")


@pytest.mark.parametrize("hostile", one_of_each_kind(ASKED))
async def test_H8_a_folder_that_is_set_off_by_a_message_costs_that_request(
    good: Good, neuron: Neuron, tmp_path: Path, hostile: Hostile
) -> None:
    folder = build(hostile, tmp_path)
    model = f"file:{folder}"
    harmless = {**QUESTION, "model": model, "max_tokens": 8}
    async with good.asked_meanwhile():
        status, answer = await load(neuron, folder)
        assert status == 200, answer
        assert (await neuron.ask(harmless, stream=False)).status == 200
        harmful = {**harmless, "messages": [{"role": "user", "content": hostile.asked}]}
        refused = await asyncio.gather(*(neuron.ask(harmful, stream=False) for _ in range(3)))
        for said in refused:
            assert said.status == 400 and said.error is not None, said
            # A tokenizer may also give up by itself before its budget is used up.
            assert said.error["code"] in ("text_budget_exceeded", "invalid_value"), said
        assert (await neuron.ask(harmless, stream=False)).status == 200
        await neuron.unload(model)


async def test_H8_all_hostile_folders_at_once_and_the_good_model_answers(
    good: Good, neuron: Neuron, tmp_path: Path
) -> None:
    folders = [build(hostile, tmp_path) for hostile in REFUSED]
    async with good.asked_meanwhile():
        answers = await asyncio.gather(*(load(neuron, folder) for folder in folders))
    for hostile, folder, (status, answer) in zip(REFUSED, folders, answers, strict=True):
        if (status, answer.get("error", {}).get("code")) != (503, "checkpoints_busy"):
            assert_refused(hostile, status, answer)
        assert not of_the_load(neuron, folder)
    assert sum(status == 422 for status, _ in answers) > len(answers) // 2


# ---------------------------------------------------------------- files that change


async def slow_load(neuron: Neuron, folder: Path) -> tuple[int, Any]:
    """Of which the weights take seconds to read."""
    levers = [{"lever": "slow_disk", "seconds_per_mb": 0.5}]
    body = {"model_id": f"file:{folder}", "max_model_len": 2048, "debug": {"levers": levers}}
    return await neuron.call("POST", "/models/load", body)


async def reads_weights(neuron: Neuron, folder: Path) -> bool:
    progress = (await neuron.model(f"file:{folder}")).get("progress") or {}
    return progress.get("phase") == "weights" and progress.get("bytes_done", 0) > 0


def harmless() -> Hostile:
    return Hostile("harmless", "none", lambda folder: None)


async def test_H8_weights_that_are_cut_short_while_they_load_end_that_load(
    good: Good, neuron: Neuron, tmp_path: Path
) -> None:
    folder = build(harmless(), tmp_path)
    async with good.asked_meanwhile():
        loading = asyncio.create_task(slow_load(neuron, folder))
        await eventually(lambda: reads_weights(neuron, folder))
        os.truncate(folder / "model.safetensors", 100_000)
        status, answer = await loading
    assert status == 422 and answer["error"]["code"] == "bad_checkpoint", answer
    assert "it has become shorter" in answer["error"]["message"]
    assert len(of_the_load(neuron, folder)) == 1, "a refusal is not tried again"
    assert (await neuron.model(f"file:{folder}"))["status"] == "failed"
    await neuron.unload(f"file:{folder}")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        pytest.param("config.json", marks=pytest.mark.full),
        pytest.param("tokenizer.json", marks=pytest.mark.full),
    ],
)
async def test_H8_a_folder_whose_files_become_fifos_serves_on_and_does_not_come_back(
    good: Good, neuron: Neuron, tmp_path: Path, name: str
) -> None:
    folder = build(harmless(), tmp_path)
    model = f"file:{folder}"
    async with good.asked_meanwhile():
        assert (await load(neuron, folder))[0] == 200
        (folder / name).unlink()
        os.mkfifo(folder / name)
        said = await neuron.ask({**QUESTION, "model": model}, stream=False)
        assert said.said == good.expected, "what has been read is not read again"
        await neuron.unload(model)
        status, answer = await load(neuron, folder)
    assert status == 422 and f"{name} is a FIFO" in answer["error"]["message"], answer


async def test_H8_an_engine_whose_folder_has_turned_hostile_is_not_rebuilt_for_ever(
    good: Good, neuron: Neuron, tmp_path: Path
) -> None:
    folder = build(harmless(), tmp_path)
    model = f"file:{folder}"
    known = set(neuron.engine_pid_set())
    assert (await load(neuron, folder))[0] == 200
    (pid,) = neuron.engine_pid_set() - known
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    os.kill(pid, 9)

    async def is_given_up() -> bool:
        return bool((await neuron.model(model)).get("status") == "failed")

    async with good.asked_meanwhile():
        await eventually(is_given_up)
    entry = await neuron.model(model)
    assert "model.safetensors is a FIFO" in entry["error"]
    said = await neuron.ask({**QUESTION, "model": model}, stream=False)
    assert said.status == 503 and said.error is not None and said.error["code"] == "model_failed"
    await neuron.unload(model)
