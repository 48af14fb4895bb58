import sys

from neuron.text_workers.host import main

sys.exit(main(sys.argv[1:]))
