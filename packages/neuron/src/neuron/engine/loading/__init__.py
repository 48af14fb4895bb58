"""Loading: from an `EngineConfig` to a running engine, and which kernels it computes with."""
