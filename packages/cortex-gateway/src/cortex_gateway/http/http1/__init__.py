"""HTTP/1 under hypercorn with the C parser of httptools: see `connection`."""
