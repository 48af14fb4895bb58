"""`python -m neuron`."""

from neuron.cli import main

main()
