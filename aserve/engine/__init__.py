"""The running engine: requests in, steps, outputs out."""
