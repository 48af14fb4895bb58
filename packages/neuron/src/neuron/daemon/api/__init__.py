"""The daemon's HTTP surface: every dialect natively, the fleet's routes, and one request path for all of them."""
