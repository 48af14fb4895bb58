"""How much device memory the recordings of decode steps (CUDA graphs) take, for both sides: no torch, no I/O.

An upper estimate from the model's shape. The graphs share one pool as large as their largest step needs: activations
and logits of that many rows, attention's partial results for the most segments a context is cut into, the sampling
kernel's lists. Beside it there is one place for logits that are sampled outside of a graph, and what the driver keeps
for each recorded launch. That last figure is an assumption (the driver does not tell); all others follow from what is
allocated.
"""

from __future__ import annotations

# Rows of the decode steps that are recorded, each with and without sampling.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_GRAPHS = 2 * len(GRAPH_SIZES)
# Attention cuts a context into at most so many segments in decode steps (kernels/attention/tiling.py).
_MAX_SEGMENTS = 32
# Per row of the sampling kernel: candidates, maxima of groups, figures of tiles.
_SAMPLING_BYTES = 40 * 1024
# Launches of a decoder layer, and around the layers.
_LAUNCHES_PER_LAYER = 10
_OTHER_LAUNCHES = 40
_BYTES_PER_LAUNCH = 10 * 1024


def graph_bytes(
    *,
    max_running: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    vocab_size: int,
    bytes_per_token: int,
    item_bytes: int,
) -> int:
    """Of one rank.

    num_heads: query heads of the rank. bytes_per_token: activations of a token of a step. item_bytes: of a weight.
    """
    rows = min(max_running, GRAPH_SIZES[-1])
    partial = _MAX_SEGMENTS * num_heads * ((1 << (head_dim - 1).bit_length()) + 2) * 4
    logits = vocab_size * (2 * item_bytes + 4 + 4)
    launches = _NUM_GRAPHS * (num_layers * _LAUNCHES_PER_LAYER + _OTHER_LAUNCHES)
    return rows * (bytes_per_token + partial + logits + _SAMPLING_BYTES) + launches * _BYTES_PER_LAUNCH
