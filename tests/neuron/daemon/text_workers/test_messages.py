"""Frames, and what of a request crosses the border."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron.daemon.text_workers.messages import MAX_FRAME_BYTES, Answer, FrameReader, decode_from_worker, encode_frame
from neuron.protocol import FrameError


@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(1, 64))
def test_frames_are_whole_however_they_are_cut(bodies: list[bytes], size: int) -> None:
    data = b"".join(bytes(encode_frame(Answer(body))) for body in bodies)
    reader, payloads = FrameReader(), []
    for start in range(0, len(data), size):
        payloads += reader.feed(data[start : start + size])
    assert [msgspec.msgpack.decode(payload)[1] for payload in payloads] == bodies


def test_a_frame_that_is_too_long_is_no_frame() -> None:
    with pytest.raises(FrameError):
        FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(FrameError):
        decode_from_worker(b"\x93\x01")
