"""Observability of the daemon: metrics, spans, and one record per request."""
