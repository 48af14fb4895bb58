"""`python -m neuron`."""

from neuron.daemon.cli import main

main()
