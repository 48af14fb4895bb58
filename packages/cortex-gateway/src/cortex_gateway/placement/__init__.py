"""Placement of requests. `router` and `evictor` decide and do no I/O; `loads` and `placement` carry it out."""
