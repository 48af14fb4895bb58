"""A group of two real rank processes, through the worker protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.neuron.engine.checkpoints import write_qwen3

from .real_group import RealGroup

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

PROMPTS = [[5, 9, 2], list(range(40, 150)), [7] * 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("tiny"))


async def test_two_ranks_answer_as_one_does(tmp_path: Path, checkpoint: Path) -> None:
    async with RealGroup(tmp_path, checkpoint, ranks=1) as alone:
        expected = await alone.answer(*PROMPTS)
    async with RealGroup(tmp_path, checkpoint, ranks=2) as group:
        assert await group.answer(*PROMPTS) == expected
        await group.incarnation.stop()
    assert list(tmp_path.iterdir()) == []
