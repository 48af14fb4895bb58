"""docs/reference/http-api.md lists exactly the fields and types that the dialects list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.dialects.anthropic_messages import content
from cortex_core.dialects.openai_responses import items, tools

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "http-api.md"
ROW = re.compile(
    r"^\| (?P<where>[^|]+) \| (?P<word>mapped|refused|echoed|ignored) \| (?P<names>[^|]+) \|$", re.MULTILINE
)

LISTS: dict[str, Any] = {"mapped": "MAPPED", "refused": "REFUSED", "echoed": "ECHOED", "ignored": "IGNORED"}
DIALECTS: dict[str, Any] = {
    "`/v1/chat/completions`": openai_chat,
    "`/v1/completions`": openai_completions,
    "`/v1/responses`": openai_responses,
    "`/v1/messages`": anthropic_messages,
}
TYPES: dict[tuple[str, str], Any] = {
    ("`input` of `/v1/responses`", "mapped"): items.MAPPED_ITEMS,
    ("`input` of `/v1/responses`", "refused"): items.REFUSED_ITEMS,
    ("`input` of `/v1/responses`", "ignored"): items.IGNORED_ITEMS,
    ("`tools` of `/v1/responses`", "mapped"): ("function", "custom", "namespace"),
    ("`tools` of `/v1/responses`", "ignored"): tools.HOSTED_TOOLS,
    ("`messages` of `/v1/messages`", "mapped"): {kind for kinds in content.BLOCKS_OF_ROLE.values() for kind in kinds},
    ("`messages` of `/v1/messages`", "refused"): content.REFUSED_BLOCKS,
    ("`messages` of `/v1/messages`", "ignored"): content.IGNORED_BLOCKS,
}


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], list[str]]:
    rows = ROW.finditer(PAGE.read_text())
    return {(row["where"], row["word"]): re.findall(r"`([^`]+)`", row["names"]) for row in rows}


def test_the_page_lists_every_field_of_every_dialect(documented: dict[tuple[str, str], list[str]]) -> None:
    real = {
        (route, word): set(getattr(dialect, name))
        for route, dialect in DIALECTS.items()
        for word, name in LISTS.items()
        if getattr(dialect, name, ())
    }
    real |= {place: set(names) for place, names in TYPES.items()}
    assert {place: set(names) for place, names in documented.items()} == real


def test_nothing_is_listed_twice(documented: dict[tuple[str, str], list[str]]) -> None:
    for where in {where for where, _ in documented}:
        names = [name for place, names in documented.items() if place[0] == where for name in names]
        assert sorted(names) == sorted(set(names)), where
