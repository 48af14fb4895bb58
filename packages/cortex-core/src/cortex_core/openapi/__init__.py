"""OpenAPI 3.1 of the servers of cortex: schemas of bodies, operations, and the document of both.

The parsers of `cortex_core.dialects` read requests by hand, so the schemas of requests stand here by hand. Tests hold
the two together: what a schema allows the parser takes or refuses for a reason in `refusals`, and what it forbids the
parser refuses.
"""
