"""How fast the page files are, learned from what the training moves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from pagemem.units import MiB

#: Bandwidth assumed until the page files have moved enough to tell, and how much is enough.
ASSUMED_BYTES_PER_S: Final = 1.5e9
TELLING_BYTES: Final = 16 * MiB


@dataclass(slots=True)
class Activity:
    """How long at least one copy of a kind has been under way, and what it moved. Guarded by the mover's lock."""

    n_bytes: int = 0
    busy_s: float = 0.0
    _under_way: int = 0
    _since_s: float = 0.0

    def begin(self) -> None:
        """A copy begins."""
        if not self._under_way:
            self._since_s = time.perf_counter()
        self._under_way += 1

    def end(self, n_bytes: int) -> None:
        """A copy of ``n_bytes`` bytes ended."""
        self._under_way -= 1
        self.n_bytes += n_bytes
        if not self._under_way:
            self.busy_s += time.perf_counter() - self._since_s

    def bytes_per_s(self) -> float:
        """Bandwidth while copies were under way."""
        return self.n_bytes / self.busy_s if self.n_bytes >= TELLING_BYTES and self.busy_s else ASSUMED_BYTES_PER_S
