"""Old place of the engine process: `neuron.engine.worker`. Kept for `python -m neuron.worker`."""

from __future__ import annotations

from neuron.engine.worker.main import run_and_exit

if __name__ == "__main__":
    run_and_exit()
