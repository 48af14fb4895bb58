"""Bodies within limits, and connections that stay usable whatever a client sends."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.http.body import ClientGone

from tests.cortex_gateway.http.harness import Server, body_of


async def test_parts_are_joined() -> None:
    body = body_of(Server(b"abc", b"", b"def", b""))
    assert await body.read([]) == b"abcdef"
    assert body.is_complete


async def test_a_declared_length_beyond_the_limit_is_refused_unread() -> None:
    server = Server(b"x" * 11)
    with pytest.raises(ApiError) as refused:
        await body_of(server).read([(b"content-length", b"11")])
    assert refused.value.status == 413
    assert server.num_received == 0


@pytest.mark.parametrize("parts", [(b"x" * 11,), (b"x" * 6, b"x" * 6), (b"x" * 6, b"x" * 6, b"x" * 6, b"")])
async def test_a_body_that_counts_beyond_the_limit_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ApiError) as refused:
        await body_of(Server(*parts)).read([])
    assert refused.value.status == 413


async def test_a_body_that_stalls_is_a_408() -> None:
    server = Server(b"x", b"")
    server.messages.pop()
    with pytest.raises(ApiError) as refused:
        await body_of(server, timeout_s=0.01).read([])
    assert refused.value.status == 408


async def test_a_client_that_leaves_in_mid_body_is_gone() -> None:
    with pytest.raises(ClientGone):
        await body_of(Server(b"x", None)).read([])


@pytest.mark.parametrize(("encoding", "encode"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
async def test_compressed_bodies_are_undone(encoding: bytes, encode: Any) -> None:
    body = body_of(Server(encode(b"hello")), max_bytes=100)
    assert await body.read([(b"content-encoding", encoding)]) == b"hello"


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        (b"zstd", b"x", 415),
        (b"gzip", b"not gzip", 400),
        (b"gzip", gzip.compress(b"hello")[:-6], 400),
        (b"gzip", gzip.compress(b"x" * 1000), 413),
    ],
    ids=["zstd", "noise", "cut", "bomb"],  # compressed bytes hold the time
)
async def test_other_encodings_noise_and_bombs_are_refused(encoding: bytes, content: bytes, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        await body_of(Server(content), max_bytes=100).read([(b"content-encoding", encoding)])
    assert refused.value.status == status
