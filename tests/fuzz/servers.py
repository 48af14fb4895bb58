"""A gateway and a neuron as real processes, and their books: what must be the same after a test as before."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tests.e2e.fleet_of_neurons import Daemon, FleetOfNeurons
from tests.e2e.fleet_process import call, eventually

BODY_TIMEOUT_S = 2
MAX_BODY_BYTES = 1_000_000
LIMITS = f"max_body_bytes = {MAX_BODY_BYTES}\nbody_timeout_s = {BODY_TIMEOUT_S}\n"

MAX_NEW_DESCRIPTORS = 16
"""Connections that pools keep open for the next request, and the odd file of a library."""
MAX_GROWTH_KB = 96 * 1024
"""Caches of compiled grammars and templates, and what an allocator does not give back. The bodies of one test run are
some tens of megabytes, answers more: what were kept of them would show."""

GATEWAY_GAUGES = ("cortex_in_flight", "cortex_waiting_requests")
NEURON_GAUGES = (
    *("neuron_requests_in_flight", "neuron_queue_depth", "neuron_kv_reserved_pages", "neuron_anon_in_flight"),
    *("neuron_principals", "neuron_engine_running", "neuron_engine_waiting"),
)
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.M)


class Footprint(NamedTuple):
    """Of one process: open descriptors, resident memory in KiB."""

    descriptors: int
    memory_kb: int


class Servers:
    """`urls` by the names `gateway` and `neuron`."""

    def __init__(self, folder: Path) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # loads of models that nobody has must not ask the world for them
        # Without keepers: the processes that were started are those that are measured.
        gateway = f"{LIMITS}load_wait_s = 2\nunstreamed_wait_s = 2\nwatchdog_s = 0\n"
        self.fleet = FleetOfNeurons(
            folder,
            num_neurons=1,
            gateway=gateway,
            neuron=f"[server]\n{LIMITS}watchdog_s = 0\n[engine]\nmax_model_len = 8192\n",
        )
        self.processes: dict[str, Daemon] = {"gateway": self.fleet.gateway, "neuron": self.fleet.neurons[0]}
        self.urls = {name: daemon.url for name, daemon in self.processes.items()}
        exporters = re.findall(r"metrics exporter on (http://\S+)/metrics", "".join(self.fleet.gateway.output))
        self.metrics_url: str = exporters[0]

    def footprints(self) -> dict[str, Footprint]:
        return {name: footprint(daemon.process.pid) for name, daemon in self.processes.items()}

    def at_work(self) -> dict[str, float]:
        """Every gauge that is not back at zero, and KV pages that are not free."""
        gauges = samples(self.metrics_url, GATEWAY_GAUGES)
        gauges |= samples(self.urls["neuron"], NEURON_GAUGES)
        pages = samples(self.urls["neuron"], ("neuron_kv_pages", "neuron_kv_free_pages"))
        gauges["pages in use"] = pages["neuron_kv_pages"] - pages["neuron_kv_free_pages"]
        return {name: value for name, value in gauges.items() if value}

    def check(self, before: dict[str, Footprint]) -> None:
        """Alive, idle, and not much larger than before. Raises `AssertionError`."""
        for name, daemon in self.processes.items():
            assert daemon.process.poll() is None, f"{name} has ended:\n" + "".join(daemon.output[-50:])
        eventually(lambda: not self.at_work(), within_s=30, what="all gauges are back at zero")
        for name, daemon in self.processes.items():
            was = before[name]
            eventually(
                lambda pid=daemon.process.pid, was=was: (
                    footprint(pid).descriptors <= was.descriptors + MAX_NEW_DESCRIPTORS
                ),
                within_s=30,
                what=f"{name} has let go of its connections ({was.descriptors} descriptors before)",
            )
            now = footprint(daemon.process.pid)
            assert now.memory_kb <= was.memory_kb + MAX_GROWTH_KB, f"{name} has grown: {was} -> {now}"
            faults = [line for line in daemon.output if "Traceback" in line or "unexpected error" in line]
            assert not faults, f"{name} failed:\n" + "".join(daemon.output[-100:])

    def stop(self) -> None:
        self.fleet.stop()


def footprint(pid: int) -> Footprint:
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    return Footprint(len(list(Path(f"/proc/{pid}/fd").iterdir())), int(resident[1]))


def samples(url: str, names: tuple[str, ...]) -> dict[str, float]:
    """The sum over all labels of each of these gauges. A gauge without samples is an error."""
    status, _, body = call(url, "GET", "/metrics")
    assert status == 200
    found = _SAMPLE.findall(body.decode())
    return {name: sum(float(value) for sample, value in found if sample == name) for name in names}
