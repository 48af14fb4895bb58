"""Source of the demo model: corpus, tokenizer, training and evaluation. Not shipped in the wheel."""
