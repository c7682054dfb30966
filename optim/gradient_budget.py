"""The reserved bytes of gradients outside the host arena: those that wait for their update, and, in lock-free mode, new
parameters on their way back.

Lock-free mode writes new parameters over the gradients they came from, so both are the same bytes until they are
adopted.
"""

from __future__ import annotations

from pagemem.budget import Budget
from pagemem.tier import Tag


class GradientBudget:
    """Counts bytes against a limit that is part of the host budget. Training thread only.

    Args:
        budget: the host budget; gradients are reserved in it, tag GRAD.
        limit_bytes: of gradients at any time.
        scratch_bytes: what a lock-free updater has outside the host arena beside them, tag STAGING.

    Attributes:
        n_bytes: taken now. peak_bytes: the most at any time.
    """

    def __init__(self, budget: Budget, limit_bytes: int, scratch_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self._used = budget.reserve(Tag.GRAD, 0, "gradients on their way")
        self._scratch = budget.reserve(Tag.STAGING, scratch_bytes, "the updater's scratch")
        self.n_bytes = 0
        self.peak_bytes = 0

    def take(self, n_bytes: int) -> bool:
        """Take so many more bytes, if they fit; returns whether they do."""
        fits = self.n_bytes + n_bytes <= self.limit_bytes and self._used.resize(self.n_bytes + n_bytes)
        if fits:
            self.n_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self.n_bytes)
        return fits

    def release(self, n_bytes: int) -> None:
        """Give so many bytes back."""
        if n_bytes:
            self.n_bytes -= n_bytes
            self._used.resize(self.n_bytes)

    def close(self) -> None:
        """Give both reservations back. Idempotent."""
        self._used.end()
        self._scratch.end()
