"""The neuron: a daemon (asyncio, torch-free) and the engine processes it supervises."""
