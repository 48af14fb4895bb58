"""`python -m neuron.worker`, started by the daemon's supervisor."""

from neuron.worker.main import run_and_exit

run_and_exit()
