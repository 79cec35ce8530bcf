"""The decision: which tokens of which sequences run next, and where their KV blocks are.

A state machine without torch, asyncio or threads. ``Scheduler.schedule()`` returns a plan,
``Scheduler.commit()`` takes its result; between the two, requests may be added or aborted freely.
"""
