"""Measurements: ``aserve bench``, and the tools behind ``make bench`` and ``make quality``."""
