"""A body in pieces."""

from __future__ import annotations

import pytest
from cortex_gateway.bodies.messages import Facts
from cortex_gateway.bodies.payload import (
    MAX_INLINE_BYTES,
    MAX_INLINE_COMMAS,
    MAX_INLINE_CONTAINERS,
    PIECE_BYTES,
    Payload,
    PiecesPayload,
)
from cortex_gateway.identity.estimate import Asked
from hypothesis import given
from hypothesis import strategies as st


def in_pieces(body: bytes, size: int) -> Payload:
    return Payload([body[start : start + size] for start in range(0, len(body), size)])


@given(st.binary(max_size=60), st.integers(1, 9))
def test_H13_no_bytes_are_lost_between_pieces(data: bytes, size: int) -> None:
    payload = in_pieces(data, size) if data else Payload([b""])
    assert b"".join(payload.slices()) == data and payload.num_bytes == len(data)
    assert payload._digest() == Payload([data])._digest()
    for start in range(0, len(data) + 1, 7):
        for end in range(start, len(data) + 1, 5):
            assert b"".join(payload.replaced((start, end), b"new").slices()) == data[:start] + b"new" + data[end:]
    assert b"".join(payload.behind(b"head").slices()) == b"head" + data


def test_small_ones_are_at_hand_and_a_large_one_is_never_put_together() -> None:
    assert in_pieces(b"abcdef", 2).whole() == b"abcdef"
    large = Payload([b"x" * MAX_INLINE_BYTES, b"y"])
    assert large.is_large and not Payload([b"x" * MAX_INLINE_BYTES]).is_large
    with pytest.raises(AssertionError):
        large.whole()


def test_no_slice_is_too_large_to_be_handed_over_at_once() -> None:
    payload = Payload([b"a", b"b" * (2 * PIECE_BYTES + 3), b"c"])
    sizes = [len(piece) for piece in payload.slices()]
    assert sizes == [1, PIECE_BYTES, PIECE_BYTES, 3, 1]


def test_what_a_worker_found_out_is_not_read_again() -> None:
    payload = Payload([b"not JSON"])
    payload.facts = Facts("m", True, Asked(8), "s", b"the prompt", (0, 1))
    assert (payload.envelope().model, payload.envelope().stream, payload.asked()) == ("m", True, Asked(8))
    hints = payload.hints([])
    assert (hints.session(), hints.prompt()) == ("s", b"the prompt")


@pytest.mark.parametrize(
    ("body", "is_quick"),
    [
        (b"[" * MAX_INLINE_CONTAINERS, True),
        (b"[" * MAX_INLINE_CONTAINERS + b"{", False),
        (b"," * MAX_INLINE_COMMAS, True),
        (b"," * (MAX_INLINE_COMMAS + 1), False),
        (b" " * (MAX_INLINE_BYTES + 1), False),
    ],
)
def test_what_holds_many_values_is_not_translated_on_the_loop(body: bytes, is_quick: bool) -> None:
    assert Payload([body]).is_quickly_translated is is_quick


async def test_the_same_body_has_the_same_digest_however_it_came() -> None:
    data = b"0123456789" * (MAX_INLINE_BYTES // 10 + 1)
    digests = {await payload.digest() for payload in (Payload([data]), in_pieces(data, 100_000))}
    assert len(digests) == 1 and digests != {await Payload([data[1:]]).digest()}


async def test_a_large_one_is_posted_piece_by_piece_as_often_as_wanted() -> None:
    class Writer:
        def __init__(self) -> None:
            self.written: list[bytes] = []

        async def write(self, piece: bytes) -> None:
            self.written.append(piece)

    payload = Payload([b"x" * MAX_INLINE_BYTES, b"y"])
    for _ in range(2):
        writer, data = Writer(), payload.data()
        assert isinstance(data, PiecesPayload) and data.size == payload.num_bytes
        await data.write(writer)  # type: ignore[arg-type]
        assert b"".join(writer.written) == b"x" * MAX_INLINE_BYTES + b"y" and len(writer.written) > 2
    assert Payload([b"small"]).data() == b"small"
