"""Grammars and JSON Schema: what a request demands of the output, within limits, for the grammar compiler."""
