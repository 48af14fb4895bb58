"""A checkpoint folder as the daemon and the engine both read it: bounded, checked, and without torch."""
