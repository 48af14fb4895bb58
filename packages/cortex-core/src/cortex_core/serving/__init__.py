"""Serving on a host, for both servers: connections, descriptors, log lines, and somebody who notices when they hang.

The one room of core that does I/O. Only the servers import it, and they bring hypercorn with them.
"""
