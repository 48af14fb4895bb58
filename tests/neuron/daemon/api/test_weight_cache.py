"""Models that come back from memory: a whole daemon, real engine processes, the demo model's weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import EngineSection, NeuronConfig
from neuron.daemon.hub.sources import demo_model_path
from neuron.daemon.supervisor.process_group import worker_command

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron


async def answer(neuron: RunningNeuron) -> str:
    status, _, body = await neuron.post(
        "/v1/chat/completions", neuron.chat("What is 12+30?", temperature=0, max_tokens=12)
    )
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["message"]["content"])


def wipe(file: Path) -> None:
    """Zeros in place of the weights, in a file that looks untouched: whoever reads it has no model."""
    status = file.stat()
    with file.open("r+b") as stream:
        header = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + header)
        stream.write(bytes(status.st_size - 8 - header))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


async def test_a_model_comes_back_from_memory_after_a_crash_and_after_an_unload(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    config = NeuronConfig(engine=EngineSection(stable_after_s=0, stop_grace_s=2.0, weight_cache_mb=size // 2**20 + 1))
    async with run_neuron(folder, config=config, command=worker_command) as neuron:
        manager = neuron.daemon.services.manager
        loaded = neuron.served.loaded
        assert loaded is not None and not loaded.read_from_memory and loaded.read_bytes > 0
        expected = await answer(neuron)
        await manager.weights.settled()
        assert manager.weights.held_bytes == size
        wipe(file)

        (pid,) = neuron.served.group.pids
        os.kill(pid, signal.SIGKILL)
        assert await answer(neuron) == expected  # it waits for the successor
        assert neuron.served.group.num_restarts == 1
        assert neuron.served.loaded.read_from_memory

        await manager.unload(neuron.model)
        assert manager.weights.held_bytes == size
        # A copy serves any division among ranks.
        await manager.load(ModelSpec(neuron.model, tensor_parallel=2))
        assert neuron.served.loaded.read_from_memory
        assert await answer(neuron) == expected
        assert manager.weights.hits == 2
        async with neuron.client.get(neuron.url + "/metrics") as response:
            text = await response.text()
        metrics = dict(re.findall(r"^(neuron_weight_cache_\w+) (\S+)$", text, re.MULTILINE))
        assert float(metrics["neuron_weight_cache_bytes"]) == size
        assert float(metrics["neuron_weight_cache_hits_total"]) == 2

        # An engine that has loaded holds none of it, and the daemon holds it once.
        for pid in neuron.served.group.pids:
            assert not copies_open(pid)
        assert len(copies_open(os.getpid())) == 1
    assert not copies_open(os.getpid())


def copies_open(pid: int) -> list[str]:
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            targets.append(str(link.readlink()))
    return [target for target in targets if "memfd:weights" in target]
