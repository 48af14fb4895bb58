"""Filling a model with weights: safetensors checkpoints read slice by slice, or seeded random ones."""
