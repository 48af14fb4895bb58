"""The process of one device: socket and frames around the device thread, which alone touches torch."""
