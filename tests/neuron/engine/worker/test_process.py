"""The real worker process over a real Unix socket, with a tiny real checkpoint."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llguidance
import pytest
from neuron.protocol import (
    Cancel,
    EngineConfig,
    EngineProgress,
    Generate,
    GrammarSpec,
    Hello,
    Loaded,
    LoadFailed,
    SamplingParams,
    Shutdown,
)

from tests.neuron.engine.worker.daemon_side import DaemonSide

GREEDY = SamplingParams(temperature=0.0)


class Worker:
    """A worker process and the daemon's end of its socket."""

    def __init__(self, folder: Path, *, epoch: int = 0, wrapper: list[str] | None = None) -> None:
        path = folder / f"{os.urandom(4).hex()}.sock"
        command = [
            sys.executable,
            "-m",
            "neuron.engine.worker",
            "--socket",
            str(path),
            "--epoch",
            str(epoch),
            "--rank",
            "0",
        ]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(60)
            self.process = subprocess.Popen(
                [*(wrapper or []), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            connection, _ = listener.accept()
        self.daemon = DaemonSide(connection)
        hello = self.daemon.receive()
        assert isinstance(hello, Hello)
        self.hello = hello

    def load(self, checkpoint: Path, **fields) -> Loaded:
        fields = {"num_threads": 1, "kv_cache_tokens": 1024, "epoch": self.hello.epoch} | fields
        self.daemon.send(EngineConfig(model_id="tiny", path=str(checkpoint), **fields))
        frames = self.daemon.until(lambda frame: isinstance(frame, (Loaded, LoadFailed)))
        assert isinstance(frames[-1], Loaded), frames[-1]
        assert all(isinstance(frame, EngineProgress) for frame in frames[:-1])
        phases = [frame.phase for frame in frames[:-1]]
        assert phases == sorted(phases, key=["starting", "weights", "kv_cache", "warm_up"].index)
        done = frames[-1]
        assert any(frame.phase == "weights" and frame.bytes_done == frame.bytes_total > 0 for frame in frames[:-1])
        return done

    def generate(self, *requests: Generate) -> dict[int, list[int]]:
        self.daemon.send(*requests)
        tokens: dict[int, list[int]] = {item.request_id: [] for item in requests}
        open_ids = set(tokens)
        while open_ids:
            frame = self.daemon.receive()
            assert frame is not None and not frame.failures, frame
            for update in frame.updates:
                tokens[update.request_id] += update.token_ids
                if update.finish is not None:
                    open_ids.discard(update.request_id)
        return tokens

    def close(self) -> None:
        self.daemon.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def start(tmp_path) -> Iterator:
    workers: list[Worker] = []

    def start(**fields) -> Worker:
        workers.append(Worker(tmp_path, **fields))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def request(request_id: int, prompt: list[int], max_tokens: int = 8, **fields) -> Generate:
    fields.setdefault("sampling", GREEDY)
    return Generate(request_id=request_id, prompt_ids=prompt, max_tokens=max_tokens, **fields)


def test_a_worker_serves_from_load_to_shutdown(start, tiny_checkpoint):
    worker = start(epoch=4)
    assert worker.hello.epoch == 4 and worker.hello.pid == worker.process.pid
    loaded = worker.load(tiny_checkpoint, tokenizer_json=(tiny_checkpoint / "tokenizer.json").read_text())
    assert (loaded.architecture, loaded.dtype, loaded.epoch) == ("Qwen3ForCausalLM", "float32", 4)
    assert (loaded.vocab_size, loaded.max_model_len, loaded.num_pages, loaded.page_size) == (320, 512, 64, 16)
    assert loaded.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert loaded.weight_bytes > 4 * 320 * 32

    alone = {number: worker.generate(request(number, [number, 7, 9], 12))[number] for number in range(4)}
    together = worker.generate(*(request(10 + number, [number, 7, 9], 12) for number in range(4)))
    assert list(together.values()) == list(alone.values())

    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    grammar = GrammarSpec(llguidance.LLMatcher.grammar_from_json_schema(schema))
    tokens = worker.generate(
        request(30, [5], 60, grammar=grammar, stop_token_ids=(0,), sampling=SamplingParams(seed=3))
    )
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json")).decode(tokens[30])
    assert isinstance(json.loads(text)["n"], int)

    worker.daemon.send(request(40, [1], 400), Cancel(40))
    frames = worker.daemon.until(lambda frame: frame.stats.running == frame.stats.waiting == 0)
    assert frames[-1].stats.free_pages == frames[-1].stats.total_pages == 64

    worker.daemon.send(Shutdown())
    assert worker.process.wait(20) == 0


def test_only_the_device_thread_has_torch_and_stacks_can_be_asked_for(start, tiny_checkpoint):
    worker = start()
    worker.load(tiny_checkpoint)
    names = {(task / "comm").read_text().strip() for task in Path(f"/proc/{worker.process.pid}/task").iterdir()}
    assert "cpu-dev-0" in names
    assert worker.generate(request(0, [1], 2))[0], "the device thread has reached its loop"
    worker.process.send_signal(signal.SIGUSR1)
    missing = {"_step_until_closed", "read_frame"}
    while missing:
        line = worker.process.stderr.readline()
        assert line, f"the worker ended without naming {missing}"
        missing = {name for name in missing if name not in line}
    assert worker.generate(request(1, [1], 2))[1], "asking for stacks does not disturb"


def test_a_worker_ends_when_the_daemon_is_gone(start, tiny_checkpoint):
    worker = start()
    worker.load(tiny_checkpoint)
    worker.daemon.send(request(0, [1, 2], 500))
    worker.daemon.receive()
    worker.daemon.close()
    assert worker.process.wait(20) == 0


def test_a_worker_without_configuration_ends_with_its_socket(start):
    worker = start()
    worker.daemon.close()
    assert worker.process.wait(20) == 0


def test_signals_for_the_whole_group_do_not_end_a_worker(start, tiny_checkpoint):
    """The daemon decides how a drain proceeds; a terminal's Ctrl-C reaches engines too."""
    worker = start()
    worker.load(tiny_checkpoint)
    worker.process.send_signal(signal.SIGTERM)
    worker.process.send_signal(signal.SIGINT)
    assert worker.generate(request(0, [1], 3))[0]


def test_a_killed_parent_takes_the_worker_with_it(tmp_path, tiny_checkpoint):
    """The socket stays open here, held by this test: only the parent is gone."""
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:]); sys.stdin.read()"
    worker = Worker(tmp_path, wrapper=[sys.executable, "-c", script])
    try:
        pidfd = os.pidfd_open(worker.hello.pid)
        worker.load(tiny_checkpoint)
        worker.process.kill()
        ready, _, _ = select.select([pidfd], [], [], 20)
        assert ready, "the worker outlived its parent"
        os.close(pidfd)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        pytest.param(lambda folder: (folder / "config.json").unlink(), "bad_checkpoint", marks=pytest.mark.full),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "bad_checkpoint"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "abacus", "architectures": ["Abacus"]}'),
            "unsupported_architecture",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_named(start, tmp_path, tiny_checkpoint, break_it, kind):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    break_it(broken)
    worker = start(epoch=2)
    worker.daemon.send(EngineConfig(model_id="broken", path=str(broken), epoch=2, num_threads=1))
    failed = worker.daemon.until(lambda frame: isinstance(frame, LoadFailed))[-1]
    assert (failed.kind, failed.epoch) == (kind, 2)
    assert failed.message
    assert worker.daemon.receive() is None
    assert worker.process.wait(20) == 4


def test_a_cache_that_does_not_fit_is_refused_with_numbers(start, tiny_checkpoint):
    worker = start()
    worker.daemon.send(EngineConfig(model_id="tiny", path=str(tiny_checkpoint), kv_cache_bytes=100, num_threads=1))
    failed = worker.daemon.until(lambda frame: isinstance(frame, LoadFailed))[-1]
    assert failed.kind == "out_of_memory" and "100" in failed.message
