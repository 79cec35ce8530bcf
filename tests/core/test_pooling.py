"""Requests that end when their prompt is computed, beside those that go on."""

from __future__ import annotations

import numpy as np
import pytest

from aserve.core.sequence import SequenceStatus
from aserve.messages.inputs import PoolingParams
from tests.core.driver import Driver
from tests.core.memory_worker import expected_output, expected_vector


class Collecting(Driver):
    """Keeps the vectors and the tokens that commits tell about."""

    def __init__(self, **options):
        super().__init__(**options)
        self.vectors, self.tokens = {}, {}
        commit = self.scheduler.commit

        def collect(plan, result, now=0.0):
            changes = commit(plan, result, now)
            for group, vector in changes.pooled:
                assert group.request_id not in self.vectors
                self.vectors[group.request_id] = vector
            for update in changes.tokens:
                self.tokens.setdefault(update.seq.group.request_id, []).append(update.token_id)
            return changes

        self.scheduler.commit = collect

    def pool(self, name, prompt):
        options = {"pooling": PoolingParams()}
        return self.add(name, prompt, max_tokens=1, temperature=0.0, ignore_eos=True, group_options=options)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"chunked_prefill": True, "max_num_batched_tokens": 8},
        {"prefix_caching": True},
        {"num_blocks": 12, "chunked_prefill": True, "max_num_batched_tokens": 16},
    ],
)
def test_vectors_beside_tokens(limits, overlap):
    driver = Collecting(overlap=overlap, **limits)
    prompts = {f"pool{i}": [7 + i, *range(i * 3)] for i in range(5)}
    groups = {name: driver.pool(name, prompt) for name, prompt in prompts.items()}
    text = [driver.add(name, 9, max_tokens=12) for name in ("ab", "abc")]
    driver.step()
    again = driver.pool("again", prompts["pool4"])
    driver.run()
    for name, prompt in prompts.items():
        assert np.array_equal(driver.vectors[name], expected_vector(prompt)), name
        assert groups[name].seqs[0].status is SequenceStatus.FINISHED_STOPPED
        assert groups[name].seqs[0].num_output_tokens == 0
    assert np.array_equal(driver.vectors["again"], expected_vector(prompts["pool4"]))
    assert again.finished
    for group in text:
        seed = group.seqs[0].rng_seed
        assert driver.tokens[group.request_id] == expected_output(group.prompt_token_ids, seed, 12, set())
    assert set(driver.tokens) == {"ab", "abc"}
    assert driver.used == 0
    driver.scheduler.verify()


def test_no_step_follows_the_prompt():
    driver = Collecting(overlap=1)
    driver.pool("a", 6)
    driver.run()
    assert [plan.counts for plan in driver.plans] == [[6]]


def test_a_vector_that_comes_after_an_abort_is_dropped():
    driver = Collecting(overlap=1)
    driver.pool("a", 6)
    driver.step()
    driver.scheduler.abort("a")
    driver.run()
    assert driver.vectors == {}
    assert (driver.scheduler.ledger.aborted, driver.scheduler.ledger.finished) == (1, 0)


def test_a_failed_one_is_told_as_failed():
    driver = Driver()
    driver.add("a", 6, max_tokens=1, group_options={"pooling": PoolingParams()})
    plan = driver.scheduler.schedule(0.0)
    result = driver.worker.run(plan)
    result.pooled, result.failed = None, {0: "the hidden state is not finite"}
    changes = driver.scheduler.commit(plan, result)
    assert [(group.request_id, reason) for group, reason in changes.failed] == [
        ("a", "the hidden state is not finite")
    ]
    driver.scheduler.verify()
