"""The process that workers are forked from: what it does not load."""

from __future__ import annotations

from pathlib import Path

import pytest
from neuron.daemon.text_workers.host_process import TextLoadError
from neuron.daemon.text_workers.served_text import ServedText

from tests.neuron.daemon.text_workers.checkpoints import ALLOCATES_WHEN_COMPILED, ALWAYS_LOOPS, PLAIN, checkpoint
from tests.neuron.daemon.text_workers.harness import SMALL


@pytest.mark.parametrize(
    ("template", "why"),
    [(ALWAYS_LOOPS, "took more than 0.5 s of processor time"), (ALLOCATES_WHEN_COMPILED, "MiB of memory")],
    ids=["loops", "allocates"],
)
async def test_H8_a_template_that_is_always_hostile_is_refused_at_load(tmp_path: Path, template: str, why: str) -> None:
    with pytest.raises(TextLoadError, match="the chat template cannot be used") as caught:
        await ServedText.open(str(checkpoint(tmp_path, template=template + PLAIN)), SMALL, label="m")
    assert why in str(caught.value)


async def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(TextLoadError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        await ServedText.open(str(tmp_path), SMALL, label="m")
