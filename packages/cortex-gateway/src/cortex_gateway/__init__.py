"""The gateway: one catalogue, one endpoint, many GPU hosts."""
