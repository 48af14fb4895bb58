"""Where models come from, what state each is in, who may use it, and how it goes."""
