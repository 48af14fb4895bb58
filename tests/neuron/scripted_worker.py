"""An engine process that speaks the protocol and computes nothing: tests script it through what they send.

`EngineConfig.debug` scripts the load: {"load": "fail" | "die" | "silent"}, and {"load_epochs": [...]}
confines that to these epochs (all, if it is left out). {"model_len": N}. {"step_deadline_s": S} is what it claims.
`--load` scripts it from the command line, and `--gate FIFO` holds a load until a test opens that FIFO for writing.

The first prompt id, or `top_k`, scripts a sequence; all others simply produce tokens 100, 101, … up to max_tokens:
HOLD yields one token and then nothing until it is cancelled; SILENT not even that one; DIE kills the process
with SIGKILL; REFUSE fails the sequence; FAULT ends the engine with an EngineFault; NOISE sends a frame that does
not decode; TALK writes to stderr first; PACED lets a moment pass before each token, but not where it goes on. In its
first life, STUCK answers pings and steps no more, and SLOW neither until it is asked for its stacks. Running sequences
are reported in `EngineStats.running`, so that a test can await that a cancel arrived.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from neuron.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    EngineConfig,
    EngineFault,
    EngineProgress,
    EngineStats,
    FromEngine,
    Generate,
    Hello,
    Loaded,
    LoadFailed,
    Logprobs,
    Ping,
    Pong,
    SequenceFailed,
    SequenceUpdate,
    Shutdown,
    StepOutput,
    ToEngine,
    decode_to_engine,
    encode_frame,
    frame_length,
)

HOLD, SILENT, DIE, REFUSE, FAULT, NOISE, TALK, STUCK, SLOW, PACED = SCRIPTS = range(2001, 2011)
PACE_S = 0.001
TOTAL_PAGES = 4096


class ScriptedWorker:
    def __init__(self, path: str, epoch: int, rank: int, *, load: str | None = None, gate: str | None = None) -> None:
        self.forced_load = load
        self.gate = gate
        self.epoch = epoch
        self.rank = rank
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(path)
        self.buffer = b""
        self.config = EngineConfig(model_id="", path="")
        self.sequences: dict[int, tuple[Generate, int]] = {}
        self.held: set[int] = set()
        self.step = 0
        self.is_stuck = False
        self.was_asked_for_stacks = False
        signal.signal(signal.SIGUSR1, self.on_stacks)

    def on_stacks(self, number: int, frame: object) -> None:
        self.was_asked_for_stacks = True
        faulthandler.dump_traceback()

    def send(self, frame: FromEngine) -> None:
        self.stream.sendall(encode_frame(frame))

    def receive(self, *, block: bool) -> list[ToEngine]:
        """Frames that have arrived; at least one if `block`. Ends the process when the daemon has gone."""
        frames: list[ToEngine] = []
        while True:
            while len(self.buffer) >= 4 and len(self.buffer) - 4 >= (length := frame_length(self.buffer[:4])):
                frames.append(decode_to_engine(self.buffer[4 : 4 + length]))
                self.buffer = self.buffer[4 + length :]
            ready = select.select([self.stream], [], [], None if block and not frames else 0)[0]
            if not ready:
                return frames
            data = self.stream.recv(65536)
            if not data:
                sys.exit(0)
            self.buffer += data

    def run(self) -> None:
        self.send(Hello(PROTOCOL_VERSION, self.epoch, self.rank, os.getpid()))
        (self.config,) = self.receive(block=True)  # type: ignore[assignment]
        assert isinstance(self.config, EngineConfig)
        self.load()
        while True:
            idle = self.is_stuck or not any(request_id not in self.held for request_id in self.sequences)
            frames = self.receive(block=idle)
            for frame in frames:
                self.handle(frame)
            if not (idle and all(isinstance(frame, Ping) for frame in frames)):
                self.make_step()

    @property
    def step_deadline_s(self) -> float:
        return float(self.config.debug.get("step_deadline_s", 60.0))

    def _misbehaves(self, how: str) -> bool:
        debug = self.config.debug
        if self.forced_load == how:
            return True
        return debug.get("load") == how and self.epoch in debug.get("load_epochs", [self.epoch])

    def load(self) -> None:
        self.send(EngineProgress("weights", 10, 100))
        if self.gate is not None:
            Path(self.gate).read_text()  # a FIFO: waits until a test opens the other end
        if self._misbehaves("die"):
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if self._misbehaves("fail"):
            self.send(LoadFailed(self.epoch, "bad_checkpoint", "a tensor is missing"))
            sys.exit(1)
        if self._misbehaves("silent"):
            signal.pause()
        self.send(EngineProgress("weights", 100, 100))
        self.send(
            Loaded(
                epoch=self.epoch,
                architecture="scripted",
                dtype="float32",
                max_model_len=int(self.config.debug.get("model_len", 4096)),
                vocab_size=4096,
                num_pages=TOTAL_PAGES,
                page_size=16,
                kv_bytes_per_token=2**16,
                weight_bytes=100,
                load_seconds=0.1,
                step_deadline_s=self.step_deadline_s,
                read_bytes=100,
                read_seconds=0.05,
            )
        )

    def handle(self, frame: ToEngine) -> None:
        if isinstance(frame, Generate):
            self.sequences[frame.request_id] = (frame, len(frame.output_ids))
        elif isinstance(frame, Cancel):
            self.sequences.pop(frame.request_id, None)
            self.held.discard(frame.request_id)
        elif isinstance(frame, Ping):
            self.send(Pong(frame.nonce))
        elif isinstance(frame, Shutdown):
            sys.exit(0)

    def make_step(self) -> None:
        if self.is_stuck:
            return
        self.step += 1
        updates: list[SequenceUpdate] = []
        failures: list[SequenceFailed] = []
        for request_id, (request, done) in list(self.sequences.items()):
            if request_id in self.held:
                continue
            script = request.sampling.top_k if request.sampling.top_k in SCRIPTS else request.prompt_ids[0]
            if script == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            elif script == FAULT:
                self.send(EngineFault(self.epoch, "device", "the device fell off"))
                sys.exit(70)
            elif script == NOISE:
                self.stream.sendall((3).to_bytes(4, "little") + b"\xc1\xc1\xc1")
                signal.pause()
            elif script == REFUSE:
                failures.append(SequenceFailed(request_id, "invalid_grammar", "no such grammar"))
                del self.sequences[request_id]
                continue
            elif script == SILENT:
                self.held.add(request_id)
                continue
            elif script == STUCK and self.epoch == 0:
                self.is_stuck = True
                return
            elif script == SLOW and self.epoch == 0 and done == 0:
                while not self.was_asked_for_stacks:
                    signal.pause()
            elif script == PACED and not request.output_ids:
                time.sleep(PACE_S)
            elif script == TALK and done == 0:
                print("the engine says hello", file=sys.stderr, flush=True)
            token = 100 + done
            finish = "length" if done + 1 >= request.max_tokens else None
            logprobs = None
            if request.sampling.logprobs >= 0:
                count = request.sampling.logprobs
                first = -token / 1024  # of this token alone, and exact
                logprobs = [Logprobs(first, list(range(token, token + count)), [first - i for i in range(count)])]
            is_first = done == len(request.output_ids)
            prompt_logprobs = [Logprobs(-1.0)] * (len(request.prompt_ids) - 1) if request.prompt_logprobs else None
            updates.append(
                SequenceUpdate(
                    request_id,
                    [token],
                    finish,
                    logprobs,
                    cached_tokens=len(request.output_ids) if is_first else None,
                    prompt_logprobs=prompt_logprobs if is_first else None,
                )
            )
            if finish:
                del self.sequences[request_id]
            else:
                self.sequences[request_id] = (request, done + 1)
                if script == HOLD:
                    self.held.add(request_id)
        pages = len(self.sequences)
        stats = EngineStats(
            step=self.step,
            running=len(self.sequences),
            free_pages=TOTAL_PAGES - pages,
            total_pages=TOTAL_PAGES,
            step_deadline_s=self.step_deadline_s,
        )
        self.send(StepOutput(self.epoch, stats, updates, failures))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--load")
    parser.add_argument("--gate")
    arguments = parser.parse_args()
    ScriptedWorker(arguments.socket, arguments.epoch, arguments.rank, load=arguments.load, gate=arguments.gate).run()


if __name__ == "__main__":
    main()
