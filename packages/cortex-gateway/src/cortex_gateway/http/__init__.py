"""HTTP as the gateway meets it: ASGI, request bodies, headers that cross it, and a faster HTTP/1."""
