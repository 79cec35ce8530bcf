"""One process for each system that is compared; each runs in the environment that has the system.

These modules import the standard library, numpy and their own system only: the peers' environment has no
torch, and aserve's has no peers.
"""
