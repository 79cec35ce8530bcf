"""``aserve gpu-check``: proves and times the CUDA kernels, and the engine on them, on the GPU at hand.

The cases here are also what the tests run on the CPU: through the emulated kernels and the native ones.
"""
