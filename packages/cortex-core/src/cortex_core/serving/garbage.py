"""Python's collector of cycles in a server: it runs while clients wait, and finds nearly nothing.

Left alone it cost the gateway 7 % of a request: a collection for every 700 objects that requests under way hold, and
again and again over what was there before the first of them came.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 5_000
"""Net allocations between two collections of the youngest. With more of them one takes long enough to be noticed, and
they no longer fit into a processor's cache."""


def settle() -> None:
    """To be called once all that stays is there: it is not looked at again, and the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
