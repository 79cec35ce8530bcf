"""Measurements: ``aserve bench serve | throughput | latency | limits``, and what ``make bench`` runs."""
