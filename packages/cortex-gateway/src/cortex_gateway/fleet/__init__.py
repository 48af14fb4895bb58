"""What the gateway knows of its neurons: a cache of what they say, and what it has under way with them."""
