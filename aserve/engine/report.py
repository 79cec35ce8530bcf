"""A request in numbers, for the log and for whoever operates the server: nothing of what it says."""

from __future__ import annotations

from typing import Any

from aserve.core.sequence import SequenceGroup


def facts(group: SequenceGroup, now: float) -> dict[str, Any]:
    """Id, state, times in seconds and token counts; None for what has not happened yet."""
    scheduled, first = group.first_scheduled_time, group.first_token_time
    return {
        "id": group.request_id,
        "state": state_of(group),
        "seconds": round(now - group.arrival_time, 6),
        "queue_seconds": None if scheduled is None else round(scheduled - group.arrival_time, 6),
        "first_token_seconds": None if first is None else round(first - group.arrival_time, 6),
        "prompt_tokens": group.num_prompt_tokens,
        "cached_tokens": group.num_cached_tokens or 0,
        "generated_tokens": sum(seq.num_output_tokens for seq in group.seqs),
        "sequences": group.width,
        "priority": group.priority,
        "preemptions": group.num_preemptions,
    }


def state_of(group: SequenceGroup) -> str:
    if group.finished:
        return "ended"
    if group.swapped:
        return "swapped"
    if all(seq.slot < 0 for seq in group.unfinished):
        return "waiting"
    return "prompt" if group.first_token_time is None else "generating"
