"""`python -m neuron.engine.worker`, started by the daemon's supervisor."""

from neuron.engine.worker.main import run_and_exit

run_and_exit()
