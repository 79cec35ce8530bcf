"""What each operation is checked with, one module a family; :mod:`aserve.gpu_check.operations` lists them."""
