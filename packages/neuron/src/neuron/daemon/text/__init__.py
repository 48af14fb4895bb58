"""Plain data of text that every other room of it shares: prompts, markers, token bytes, limits."""
