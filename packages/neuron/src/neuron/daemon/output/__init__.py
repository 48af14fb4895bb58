"""Output text: token ids become events, with reasoning, tool calls and stop strings told apart."""
