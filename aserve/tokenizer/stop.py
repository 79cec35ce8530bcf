"""Stop strings in text that arrives piece by piece."""

from __future__ import annotations


class StopChecker:
    """Looks for stop strings and decides how much text may be shown.

    ``text`` is what may be shown so far. It only ever grows: as long as the sequence is unfinished, the
    last characters that could still turn out to be the beginning of a stop string are held back
    (all but one of the longest stop string's). Nothing is held back when stop strings stay in the output.

    stop: non-empty strings; the first in the list that occurs wins.
    include: whether the stop string itself is part of the text.
    """

    def __init__(self, stop: list[str], include: bool) -> None:
        self.text = ""
        self._stop = stop
        self._include = include
        self._held = 0 if include else max(map(len, stop)) - 1
        self._longest = max(map(len, stop))
        self._tail = ""
        self._ended = False

    def feed(self, delta: str, *, searching: bool = True) -> str | None:
        """Adds text; returns the stop string found in it, if any.

        searching: False while stop strings do not count yet (before ``min_tokens``).
        """
        # Everything before the tail is shown already, and too far back to be part of a new match.
        tail = self._tail + delta
        if searching:
            for word in self._stop:
                # A match must end in the new text; one that ended earlier was not to be looked for.
                at = tail.find(word, max(0, len(self._tail) - len(word) + 1))
                if at >= 0:
                    end = at + len(word) if self._include else at
                    shown = max(0, len(self._tail) - self._held)
                    self.text += tail[shown:end]
                    self._ended = True
                    return word
        self._show(tail, len(self._tail))
        return None

    def finish(self, rest: str) -> None:
        """Shows what was held back, and ``rest``; the sequence has ended for another reason."""
        if not self._ended:
            hidden = min(len(self._tail), self._held)
            self.text += self._tail[len(self._tail) - hidden :] + rest
            self._ended = True

    def fork(self) -> StopChecker:
        copy = StopChecker(self._stop, self._include)
        copy.text, copy._tail, copy._ended = self.text, self._tail, self._ended
        return copy

    def _show(self, tail: str, old_length: int) -> None:
        shown = max(0, old_length - self._held)
        until = max(shown, len(tail) - self._held)
        self.text += tail[shown:until]
        keep = max(self._held, self._longest - 1)
        self._tail = tail[max(0, len(tail) - keep) :]
