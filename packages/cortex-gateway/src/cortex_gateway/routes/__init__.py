"""What the gateway answers to: one module per surface."""
