"""The phases of a run; :mod:`aserve.gpu_check.plan` lists them."""
