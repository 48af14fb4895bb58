"""The README's example runs and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages/cortex-core/README.md"


def test_the_example_answers_in_both_dialects(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("data: [DONE]") == 1
    assert printed.count("event: message_stop") == 1
    assert printed.count("It is 42.") == 2


def test_every_module_named_exists() -> None:
    named = set(re.findall(r"`(cortex_core\.[\w.]+)`", README.read_text()))
    source = README.parent / "src"
    for name in named:
        path = source / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
