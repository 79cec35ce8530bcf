"""Measurements: ``aserve bench serve | throughput | latency | limits``, and the tools behind ``make bench``."""
