"""One fleet for all end-to-end tests that leave it as they found it; tests that break things start their own."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from .fleet_process import FleetProcess


@pytest.fixture(scope="session")
def fleet() -> Iterator[FleetProcess]:
    running = FleetProcess()
    yield running
    assert running.stop() == 0, "".join(running.output)


@pytest.fixture(scope="session")
def openai_client(fleet: FleetProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def anthropic_client(fleet: FleetProcess) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=fleet.url, api_key="none", max_retries=0, timeout=120)
