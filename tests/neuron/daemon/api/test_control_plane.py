"""What the fleet asks a neuron must be answered whatever its engines do."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.neuron.daemon.api.harness import run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import HOLD

ROUTES = ("/health", "/models", "/discovery", "/version", "/v1/models")


async def test_F22_the_fleet_is_answered_while_an_engine_stands_still_with_work_in_hand(checkpoint: Path) -> None:
    """SIGSTOP: whatever would ask the engine would wait for ever. How fast is measured by bench/responsiveness.py."""
    async with run_neuron(checkpoint) as neuron:
        asking = asyncio.create_task(neuron.post("/v1/chat/completions", neuron.chat(top_k=HOLD, max_tokens=50)))
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        (pid,) = neuron.served.group.pids
        os.kill(pid, signal.SIGSTOP)
        try:
            for path in ROUTES:
                assert await neuron.get(path)
            async with neuron.client.get(neuron.url + "/metrics") as response:
                assert response.status == 200
            status, _, body = await neuron.post("/v1/messages/count_tokens", neuron.chat())
            assert status == 200, body
        finally:
            os.kill(pid, signal.SIGCONT)
            asking.cancel()


async def test_F22_the_fleet_is_answered_while_a_model_loads(checkpoint: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        loading = asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model}))
        await eventually(lambda: bool(neuron.daemon.services.manager.all()))
        await eventually(lambda: neuron.served.state.phase == "loading")
        for path in ROUTES:
            assert await neuron.get(path)
        await asyncio.to_thread(gate.write_text, "go")
        assert (await loading)[0] == 200


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_F33_shutting_down_waits_for_no_engine(checkpoint: Path, number: signal.Signals) -> None:
    """One that is stopped answers nothing, ever; it is killed after its grace time, and the daemon ends."""
    async with run_neuron(checkpoint) as neuron:
        (pid,) = neuron.served.group.pids
        os.kill(pid, number)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
