"""Doors of both servers, beside `http_access`: the names that a host answers to, and pages of other origins."""
