"""What operators see: metrics and one access line per request."""
