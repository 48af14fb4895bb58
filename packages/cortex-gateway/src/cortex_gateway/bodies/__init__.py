"""Bodies that are too large to be read on the event loop are read in a process of their own.

Nothing that a client sends may hold the loop: JSON of 31 MB takes its decoder 10 to 180 ms, in one call that no other
thread runs beside, and writing it anew for another server up to ten seconds. So what a gateway has to know of a large
body is found out elsewhere, within a budget of processor time and memory that the kernel enforces; the body itself
stays where it is, in the pieces that it came in.

`messages` is the border; `pool` and `process` are on the gateway's side of it, `worker` and `jobs` on the other.
"""
