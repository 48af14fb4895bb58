"""One gateway and one neuron for all fuzz tests; after each module their books must balance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.fleet_process import MODEL, call
from tests.fuzz.servers import Servers


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("fuzz"))
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def servers(running: Servers) -> Iterator[Servers]:
    """Warm before the first look at them: grammars, templates and pools are made on first use."""
    for url in running.urls.values():
        for stream in (False, True):
            body = {"model": MODEL, "max_tokens": 5, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
            for extra in ({}, {"response_format": {"type": "json_object"}}):
                status, _, answer = call(url, "POST", "/v1/chat/completions", {**body, **extra})
                assert status == 200, answer
    before = running.footprints()
    yield running
    running.check(before)
