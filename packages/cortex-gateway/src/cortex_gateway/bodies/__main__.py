"""Entry of `python -m cortex_gateway.bodies`: a body worker."""

import sys

from cortex_gateway.bodies.worker import main

sys.exit(main(sys.argv[1:]))
