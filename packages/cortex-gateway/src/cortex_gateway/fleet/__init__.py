"""Neurons as the gateway knows them: a cache of what they say, and what it has under way with them."""
