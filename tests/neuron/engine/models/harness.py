"""The smallest model that has a part for each of four ranks."""

from __future__ import annotations

from typing import Any

import torch

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
