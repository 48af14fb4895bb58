"""Configuration of a gateway: one value, read from files, held in one place, and replaced whole while it runs.

`value` is the configuration and its one holder, `difference` says what a new one changes and `weaker` what it would
take away (both pure), `watch` when files have changed and settled, `reload` reads, checks and applies. Other rooms hold
the holder and look into it whenever they need something; what they derive from it (clients, principals, the list of
nodes) is renewed by `Gateway.apply` alone.
"""
