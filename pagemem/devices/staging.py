"""Host memory of a fixed size for what a device copies down, handed out in spans that come back when nobody has views
of them any more.

Memory pinned request by request would come from torch's own pool, which rounds sizes up to powers of two and keeps all
it ever had: more than any budget says. This is pinned once, and what it takes is what it was made with.
"""

from __future__ import annotations

from typing import Final

import torch

from pagemem.devices.arena import HostArena, Pin
from pagemem.frames.page import FrameId, TensorId
from pagemem.units import round_up

#: Where spans begin; a vector register of the CPU's kernels is no longer.
ALIGN_BYTES: Final = 64


class StagingBuffer:
    """``n_bytes`` of host memory in one mapping. One thread at a time; views may die on any.

    Args:
        n_bytes: at least 1; the caller has them reserved.
        pin: makes it fit for copies by the device; None: it is as it is.

    Raises:
        MemoryError: it cannot be mapped.
    """

    def __init__(self, n_bytes: int, pin: Pin | None) -> None:
        self.n_bytes = n_bytes
        self._arena = HostArena(1, n_bytes, pin)
        self._taken: dict[TensorId, tuple[int, int]] = {}  # [start, end) of each span, in the order of their starts
        self._n_spans = 0

    def take(self, n_bytes: int) -> torch.Tensor | None:
        """A free span (uint8, flat, aligned), the first that is long enough; None: there is none now.

        Where it lies depends on the sizes and ends of spans before, and on nothing else.
        """
        for ended in self._arena.ended_leases():
            del self._taken[ended]
        start = 0
        for taken_start, taken_end in self._taken.values():
            if start + n_bytes <= taken_start:
                break
            start = round_up(taken_end, ALIGN_BYTES)
        if start + n_bytes > self.n_bytes:
            return None
        span = TensorId(self._n_spans)
        self._n_spans += 1
        self._taken[span] = (start, start + n_bytes)
        self._taken = dict(sorted(self._taken.items(), key=lambda entry: entry[1]))
        return self._arena.lease(span, FrameId(0), start, torch.uint8, n_bytes)

    def close(self) -> None:
        """Give the memory back, once no views live. No copy may be under way. Idempotent.

        Raises:
            RuntimeError: as `HostArena.close`.
        """
        self._arena.close()
