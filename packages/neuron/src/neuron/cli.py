"""Old place of the command line: `neuron.daemon.cli`. Kept for `python -m neuron.cli` and packages that look for it."""

from __future__ import annotations

from neuron.daemon.cli import main

if __name__ == "__main__":
    main()
