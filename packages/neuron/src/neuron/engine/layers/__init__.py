"""Building blocks of the model families, in their tensor-parallel form. Hidden states are packed: [T, H]."""
