"""Bytes of the storages that autograd keeps for the backward pass, by what becomes of them, and the most there were."""

from __future__ import annotations

from dataclasses import dataclass

from pagemem.process.gone import Gone


@dataclass(frozen=True, slots=True)
class Counted:
    """One storage.

    Attributes:
        repeatable: there is a recipe for it. recomputed: it is let go of, and computed again. paged: it goes to pages.
    """

    n_bytes: int
    repeatable: bool
    recomputed: bool
    paged: bool


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of storages when most were saved; those that could be computed again among them."""

    saved_bytes: int = 0
    repeatable_bytes: int = 0


class SavedBytes:
    """Counts the storages of one engine. Training thread only; they may end on any, at any moment.

    Attributes:
        ever_bytes: of all that was ever counted.
        expected: the peak of the pass before; None in the first one.
    """

    def __init__(self) -> None:
        self.ever_bytes = 0
        self.expected: Peak | None = None
        self._peak = Peak()
        self._gone: Gone[Counted] = Gone()
        self._saved = self._repeatable = self._recomputed = self._paged = 0

    def count(self, storage: object, counted: Counted) -> None:
        """Count a storage until it is gone."""
        self._collect()
        self._gone.watch(storage, counted)
        self.ever_bytes += counted.n_bytes
        self._add(counted, counted.n_bytes)
        if self._saved > self._peak.saved_bytes:
            self._peak = Peak(self._saved, self._repeatable)

    def _collect(self) -> None:
        for counted in self._gone.take():
            self._add(counted, -counted.n_bytes)
            if not self._saved:
                self.expected, self._peak = self._peak, Peak()

    def _add(self, counted: Counted, n_bytes: int) -> None:
        self._saved += n_bytes
        self._repeatable += n_bytes * counted.repeatable
        self._recomputed += n_bytes * counted.recomputed
        self._paged += n_bytes * counted.paged

    @property
    def saved(self) -> int:
        """Bytes of all storages that are kept now."""
        self._collect()
        return self._saved

    @property
    def recomputed(self) -> int:
        """Of those, what is computed again."""
        self._collect()
        return self._recomputed

    @property
    def paged(self) -> int:
        """Of those, what goes to pages."""
        self._collect()
        return self._paged

    def excess(self, limit_bytes: int) -> tuple[float, int]:
        """By how much this pass is going to exceed a limit, and how much of what there will be has recipes; all of it,
        in a first pass."""
        self._collect()
        return (
            (float("inf"), 0)
            if self.expected is None
            else (self.expected.saved_bytes - limit_bytes, self.expected.repeatable_bytes)
        )
