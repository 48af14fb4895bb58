import sys

from cortex_gateway.body_workers.worker import main

sys.exit(main(sys.argv[1:]))
