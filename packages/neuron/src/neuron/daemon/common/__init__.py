"""Configuration and threads, which every room of the daemon may use."""
