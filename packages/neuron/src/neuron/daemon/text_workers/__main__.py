"""Entry of `python -m neuron.daemon.text_workers`: the processes of one model's text."""

import sys

from neuron.daemon.text_workers.host import main

sys.exit(main(sys.argv[1:]))
