"""Frames between a daemon and its engines: whole, told apart, and refused where they are no frames."""

from __future__ import annotations

import msgspec
import pytest
from neuron import protocol
from neuron.protocol import (
    MAX_FRAME_BYTES,
    Cancel,
    EngineConfig,
    EngineFault,
    EngineProgress,
    EngineStats,
    FrameError,
    FromEngine,
    Generate,
    GrammarSpec,
    Hello,
    Loaded,
    LoadFailed,
    Logprobs,
    Ping,
    Pong,
    SamplingParams,
    SequenceFailed,
    SequenceUpdate,
    Shutdown,
    StepOutput,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode_frame,
    frame_length,
)

TO_ENGINE: list[ToEngine] = [
    EngineConfig(model_id="m", path="/m", epoch=3),
    Generate(1, [1, 2], SamplingParams(temperature=0.5, logit_bias={3: -1.0}), 9, (7,), output_ids=(5,)),
    Cancel(1),
    Shutdown(),
    Ping(7),
]
FROM_ENGINE: list[FromEngine] = [
    Hello(3, 0, 5, 1),
    Pong(7),
    Loaded(3, "Qwen3ForCausalLM", "bfloat16", 4096, 1000, 64, 16, 2**16, 2**30, 1.5),
    StepOutput(3, EngineStats(step=5), [SequenceUpdate(1, [7], "stop", [Logprobs(-0.5, [7], [-0.5])], 2)]),
    StepOutput(3, EngineStats(step=6), [], [SequenceFailed(1, "nan_logits", "of row 3")]),
    EngineFault(3, "device", "lost"),
]


def payload_of(message: ToEngine | FromEngine) -> bytes:
    frame = encode_frame(message)
    assert frame_length(frame[:4]) == len(frame) - 4
    return frame[4:]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_what_is_sent_to_an_engine_arrives(message: ToEngine) -> None:
    assert decode_to_engine(payload_of(message)) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_what_an_engine_sends_arrives(message: FromEngine) -> None:
    assert decode_from_engine(memoryview(payload_of(message))) == message


def test_the_two_directions_are_told_apart() -> None:
    with pytest.raises(FrameError):
        decode_to_engine(payload_of(FROM_ENGINE[0]))
    with pytest.raises(FrameError):
        decode_from_engine(payload_of(TO_ENGINE[1]))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x90", b"\x92\xa4ping", b"\x92\xa6nobody\x07", b"\x92\xa4ping\xa1x"]
)
def test_noise_is_no_frame(payload: bytes) -> None:
    with pytest.raises(FrameError):
        decode_to_engine(payload)
    with pytest.raises(FrameError):
        decode_from_engine(payload)


def test_a_frame_that_is_too_long_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frame_length(MAX_FRAME_BYTES.to_bytes(4, "little")) == MAX_FRAME_BYTES
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES)):
        frame_length((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="exceeds the limit of 100"):
        encode_frame(Generate(1, [70_000] * 100, SamplingParams(), 9))


def test_fields_that_an_older_build_does_not_send_have_their_defaults() -> None:
    """Frames are arrays: what is new comes last, and may be missing."""
    whole = msgspec.msgpack.decode(payload_of(SequenceUpdate(1, [7], "stop")))  # type: ignore[arg-type]
    short = msgspec.msgpack.encode(["step", 3, [5], [whole[:2]]])
    output = decode_from_engine(short)
    assert output == StepOutput(3, EngineStats(step=5), [SequenceUpdate(1, [7])])


def test_a_grammar_and_progress_travel_whole() -> None:
    grammar = GrammarSpec("json", "{}")
    message = Generate(1, [1], SamplingParams(), 9, grammar=grammar)
    decoded = decode_to_engine(payload_of(message))
    assert isinstance(decoded, Generate) and decoded.grammar == grammar
    for made in (EngineProgress("weights", 5, 10), LoadFailed(3, "bad_checkpoint", "no header")):
        assert decode_from_engine(payload_of(made)) == made
