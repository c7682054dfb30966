"""The reserved bytes of gradients on their way to the update thread, and of new parameters on their way back.

New parameters are written over the gradients they came from, so both are the same bytes until they are adopted.
"""

from __future__ import annotations

from pagemem.budget import Budget
from pagemem.tier import Tag


class GradientBudget:
    """Counts bytes against a limit that is part of the host budget. Training thread only.

    Args:
        budget: the host budget; gradients on their way are reserved in it, tag GRAD.
        limit_bytes: of gradients on their way at any time.
        scratch_bytes: what the update thread has outside the host arena beside them, tag STAGING.
    """

    def __init__(self, budget: Budget, limit_bytes: int, scratch_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used = budget.reserve(Tag.GRAD, 0, "gradients on their way")
        self._scratch = budget.reserve(Tag.STAGING, scratch_bytes, "the updater's scratch")
        self.n_bytes = 0
        self.peak_bytes = 0

    def fits(self, n_bytes: int) -> bool:
        """Whether so many more bytes are left."""
        return self.n_bytes + n_bytes <= self.limit_bytes

    def change(self, delta_bytes: int) -> None:
        """``delta_bytes`` were taken (+) or released (-); what is taken must fit."""
        if not delta_bytes:
            return
        n_bytes = self.n_bytes + delta_bytes
        if not self._used.resize(n_bytes):
            raise AssertionError(f"{n_bytes} bytes of gradients do not fit in what was set aside, {self.limit_bytes}")
        self.n_bytes = n_bytes
        self.peak_bytes = max(self.peak_bytes, n_bytes)

    def close(self) -> None:
        """Give both reservations back. Idempotent."""
        self._used.end()
        self._scratch.end()
