"""Metrics, access lines, traces and captures: what operators see."""
