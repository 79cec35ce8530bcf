"""The samples of a step on a device with memory of its own: who draws them, and their way back.

Most rows are drawn on the device without the host. Others need it: a guide and a logits processor must know
the token drawn before, beams report candidates. Their rows, and only theirs, are drawn
by the common sampler, for which the launch waits. Pooled rows go back as vectors.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from aserve.messages.step import SampleLogprobs, StepPlan, StepResult
from aserve.sampling.on_device import Draw, Drawn, is_free
from aserve.worker.accelerator import Accelerator, Event
from aserve.worker.contained import ContainedRows
from aserve.worker.device_batch import DeviceBatch
from aserve.worker.staging import Download, PinnedPool, Upload

logger = logging.getLogger(__name__)


class _Rows:
    """Rows of a tensor that the step's numbers say."""

    def __init__(self, rows: list[int], upload: Upload) -> None:
        self._upload = upload
        self._count = len(rows)
        self._in_order = rows == list(range(len(rows)))
        self._rows = -1 if self._in_order else upload.add_ids(rows)

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Those rows, perhaps a view."""
        return logits[: self._count] if self._in_order else logits.index_select(0, self._upload[self._rows])


class _Group(_Rows):
    """Samples that are treated alike. at: their indices. rows: the rows of the logits they are drawn from.
    total: how many samples there are."""

    def __init__(self, at: list[int], rows: list[int], total: int, upload: Upload) -> None:
        super().__init__(rows, upload)
        self.at = at
        self._at = None if len(at) == total else upload.add_ids(at)

    def put(self, token_ids: torch.Tensor | None, drawn: torch.Tensor, total: int) -> torch.Tensor:
        """Token ids of all samples with those of these put in their places."""
        if self._at is None:
            return drawn
        if token_ids is None:
            token_ids = torch.zeros(total, dtype=torch.int64, device=drawn.device)
        return token_ids.index_copy(0, self._upload[self._at], drawn)


class Samples:
    """Made before the step's numbers are sent, then drawn from its logits, then finished.

    captured: the logits are those of all rows; else of the rows that are drawn from, once each.
    """

    def __init__(
        self, plan: StepPlan, upload: Upload, rows: ContainedRows, batch: DeviceBatch, *, captured: bool
    ) -> None:
        self._plan = plan
        self._history = batch.history
        pooled = batch.pooled
        self._contained = rows
        self._slots = slots = [slot for _, slot in plan.samples]
        self._upload = upload
        vectors = [i for i, slot in enumerate(slots) if slot in pooled] if pooled else []
        drawn = [i for i in range(len(slots)) if i not in set(vectors)] if vectors else range(len(slots))
        self.num_drawn = len(drawn)
        ends = np.cumsum(plan.counts) - 1
        place = {}
        if not captured:
            distinct = list(dict.fromkeys(plan.samples[i][0] for i in drawn))
            place = {row: at for at, row in enumerate(distinct)}
            self._picked = _Rows([int(ends[row]) for row in distinct], upload)
        self._vectors = vectors
        self._vector_rows = _Rows([int(ends[plan.samples[i][0]]) for i in vectors], upload)
        free = is_free(rows.sampler, [slots[i] for i in drawn]) if drawn else np.zeros(0, dtype=bool)
        self._free, self._bound = (
            self._group([i for i, is_so in zip(drawn, free, strict=True) if is_so == wanted], place)
            for wanted in (True, False)
        )
        self._draw = None
        if self._free.at:
            self._draw = Draw(rows.sampler, [slots[i] for i in self._free.at], upload, batch.device)
        self._drawn: Drawn | None = None
        self._result = StepResult(plan.step_id, [0] * len(slots), [0.0] * len(slots))
        self._failed: dict[int, str] = {}
        self._pooled: torch.Tensor | None = None

    def _group(self, at: list[int], place: dict[int, int]) -> _Group:
        rows = [self._plan.samples[i][0] for i in at]
        return _Group(at, [place.get(row, row) for row in rows], len(self._slots), self._upload)

    def pick(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states ``[T, H]`` those that logits are wanted of."""
        return self._picked.of(hidden)

    def pool(self, hidden: torch.Tensor) -> None:
        """Takes the pooled rows of hidden states ``[T, H]``."""
        if self._vectors:
            self._pooled = self._vector_rows.of(hidden).float()

    def draw(self, logits: torch.Tensor, greedy: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """logits: float32 ``[R, V]``. greedy: of every row what :func:`aserve.ops.greedy_logprob` gives."""
        token_ids, total = None, len(self._slots)
        if self._draw is not None:
            known = None if greedy is None else (self._free.of(greedy[0]), self._free.of(greedy[1]))
            self._drawn = self._draw.run(self._free.of(logits), self._history, known)
            token_ids = self._free.put(token_ids, self._drawn.token_ids, total)
        if self._bound.at:
            token_ids = self._bound.put(token_ids, self._draw_bound(logits), total)
        if token_ids is None:
            raise RuntimeError("there is nothing to draw")
        self.token_ids = token_ids
        """int64 ``[S]``; of pooled samples meaningless."""

    def _draw_bound(self, logits: torch.Tensor) -> torch.Tensor:
        group, result = self._bound, self._result
        slots = [self._slots[i] for i in group.at]
        # A copy: the sampler writes to its logits.
        sampled = self._contained.sample(lambda: group.of(logits).clone(), list(range(len(slots))), slots)
        found = zip(group.at, sampled.token_ids.tolist(), sampled.logprobs.tolist(), strict=True)
        for i, token, logprob in found:
            result.token_ids[i], result.logprobs[i] = token, logprob
        result.details = {group.at[i]: entry for i, entry in sampled.details.items()} or None
        self._failed.update((group.at[i], reason) for i, reason in sampled.failed.items())
        return sampled.token_ids

    def finish(
        self,
        accelerator: Accelerator,
        pool: PinnedPool,
        started: Event,
        prompt_logprobs: dict[int, list[SampleLogprobs]] | None,
    ) -> Launched:
        """Sends the results back."""
        self._result.prompt_logprobs = prompt_logprobs
        broken = self._contained.broken
        self._failed.update((i, broken[slot]) for i, slot in enumerate(self._slots) if slot in broken)
        download = Download(accelerator, pool)
        if self._drawn is not None:
            drawn = self._drawn
            for each in (drawn.token_ids, drawn.logprobs, drawn.highest, drawn.ranks, *(drawn.tops or ())):
                if each is not None:
                    download.add(each)
        if self._pooled is not None:
            download.add(self._pooled)
        download.send()
        return Launched(self, download, started)

    def result(self, arrays: list[np.ndarray], seconds: float) -> StepResult:
        """The step's result, from what came back."""
        result, failed = self._result, self._failed
        result.seconds = seconds
        if self._pooled is not None:
            result.pooled = {}
            for i, vector in zip(self._vectors, arrays.pop(), strict=True):
                if np.isfinite(vector).all():
                    result.pooled[i] = vector
                else:
                    failed[i] = "the hidden state is not finite"
        if self._draw is not None:
            self._read_drawn(self._draw, arrays)
        result.failed = failed or None
        return result

    def _read_drawn(self, draw: Draw, arrays: list[np.ndarray]) -> None:
        token_ids, logprobs, highest, *lists = arrays
        result, at = self._result, self._free.at
        if len(at) == len(result.token_ids):
            result.token_ids, result.logprobs = token_ids.tolist(), logprobs.tolist()
        else:
            for i, token, logprob in zip(at, token_ids.tolist(), logprobs.tolist(), strict=True):
                result.token_ids[i], result.logprobs[i] = token, logprob
        for i, reason in draw.failed(logprobs, highest).items():
            self._failed.setdefault(at[i], reason)
            result.token_ids[at[i]], result.logprobs[at[i]] = 0, 0.0
        if lists:
            tops = (lists[1], lists[2]) if len(lists) > 1 else None
            details = draw.details(logprobs, lists[0], tops)
            result.details = (result.details or {}) | {at[i]: entry for i, entry in details.items()}


class Launched:
    """A step that is on its way; ``wait`` sleeps until it is done, in any thread."""

    __slots__ = ("_download", "_samples", "_started")
    ready = False

    def __init__(self, samples: Samples, download: Download, started: Event) -> None:
        self._samples = samples
        self._download = download
        self._started = started

    def wait(self) -> StepResult:
        arrays = self._download.wait()
        seconds = self._started.elapsed_time(self._download.event) / 1000
        return self._samples.result(arrays, seconds)
