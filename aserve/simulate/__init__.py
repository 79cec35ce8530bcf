"""Capacity planning: the scheduler of the engine against a modelled device, in virtual time.

``aserve simulate`` puts a trace of requests through :class:`aserve.core.scheduler.Scheduler` itself. Only
the device is a model (:mod:`aserve.simulate.device`): a step lasts as long as a roofline says, so an hour of
traffic takes seconds. No weights, no torch.
"""
