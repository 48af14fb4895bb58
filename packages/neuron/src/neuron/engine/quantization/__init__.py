"""Weight formats: how a linear layer's matrix is stored in a checkpoint and held, filled and multiplied."""
