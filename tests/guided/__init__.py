"""Guided decoding: outputs that follow a schema, an expression or a grammar."""
