"""The schemas of chat and completions requests say what the parsers take."""

from __future__ import annotations

from types import ModuleType

import pytest
from cortex_core.dialects import openai_chat, openai_completions

from tests.cortex_core.openapi.harness import (
    check_that_good_bodies_are_good,
    check_that_schema_and_parser_judge_alike,
    check_that_the_schema_has_the_fields_of,
)

SURFACES = ("chat", "completions")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("surface", SURFACES)
def test_a_schema_and_its_parser_judge_alike(surface: str) -> None:
    check_that_schema_and_parser_judge_alike(surface)


@pytest.mark.parametrize("surface", SURFACES)
def test_the_bodies_that_are_varied_fit_and_are_taken(surface: str) -> None:
    check_that_good_bodies_are_good(surface)


@pytest.mark.parametrize(("name", "dialect"), [("ChatRequest", openai_chat), ("CompletionRequest", openai_completions)])
def test_a_schema_has_exactly_the_fields_of_its_dialect(name: str, dialect: ModuleType) -> None:
    check_that_the_schema_has_the_fields_of(name, dialect)
