"""What a processor does well decides the dtype of models on a CPU; here it is the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from neuron.checkpoint import layout


@pytest.fixture(scope="session", autouse=True)
def no_products_of_bfloat16() -> Iterator[None]:
    """Processes that tests start go by the real one: `NEURON_ENGINE__DTYPE=bfloat16` has them do as on AMX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "multiplies_bfloat16", lambda: False)
        yield
