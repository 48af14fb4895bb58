import sys

from neuron.daemon.text_workers.host import main

sys.exit(main(sys.argv[1:]))
