"""How long the books are shaken: `CORTEX_ROUNDS` random histories for each state machine, a few by default.

CORTEX_ROUNDS=500 uv run pytest -q tests/neuron -k accounting
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

ROUNDS = int(os.environ.get("CORTEX_ROUNDS", "100"))

SHAKEN = settings(
    max_examples=ROUNDS, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
