"""One copy from host pages to the device, which may begin while the bytes are still being read from the page files.

WAITING --(bytes are there)--> BEGUN --(all are enqueued on the device, or it failed)--> ENDED
   ^                             |
   +------(the load failed)------+
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch

from pagemem.devices.accelerator import Copy, DeviceEvent
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.state_machine import StateMachine
from pagemem.telemetry.intervals import union, without

#: Called with the event behind a copy once it is enqueued on the device, or with what went wrong.
OnEnqueued = Callable[[DeviceEvent | BaseException], None]
#: [start, end) of a tensor's bytes.
Span = tuple[int, int]


class UploadState(enum.Enum):
    """How far a copy up is; see the diagram at the top of this module."""

    WAITING = "waiting"
    BEGUN = "begun"
    ENDED = "ended"


_MOVES: Final = StateMachine(
    "copy of",
    {UploadState.WAITING: {UploadState.BEGUN}, UploadState.BEGUN: {UploadState.ENDED, UploadState.WAITING}},
)


@dataclass(slots=True, eq=False)
class Upload:
    """One copy up. Guarded by the lock of the mover below, but for ``copy``, which is the copier's thread's own.

    Attributes:
        arrived: spans of the load whose bytes are copied as they come; n_taken: how many of them were.
        copy: behind what is enqueued on the device so far.
    """

    tensor: PagedTensor
    into: torch.Tensor
    after: DeviceEvent
    on_enqueued: OnEnqueued
    state: UploadState = UploadState.WAITING
    arrived: list[Span] = field(default_factory=list)
    n_taken: int = 0
    copy: Copy | None = None

    def become(self, state: UploadState) -> None:
        """Apply one legal move.

        Raises:
            TransitionError: there is no such move; nothing was changed.
        """
        self.state = _MOVES.move(self.state, state, self.tensor.name)

    @property
    def stale(self) -> bool:
        """Whether what it has copied so far came by a load that failed."""
        there = self.tensor.whole or self.tensor.state is Residency.LOADING
        return self.state is UploadState.BEGUN and not (there and self.arrived is self.tensor.arrived)

    @property
    def can_go_on(self) -> bool:
        """Whether there is something to do for it."""
        if self.state is UploadState.WAITING and self.tensor.updates:
            return False  # what it has is out of date; a copy that has begun was asked for before
        if self.tensor.whole or self.stale:
            return True
        return self.tensor.state is Residency.LOADING and len(self.tensor.arrived) > self.n_taken

    def take(self) -> list[Span]:
        """What has come since the last time, joined where it is adjacent; all that is left, once all is there."""
        if self.state is UploadState.WAITING:
            if self.tensor.whole:
                return [(0, self.tensor.n_bytes)]
            self.arrived = self.tensor.arrived
        before, come = self.arrived[: self.n_taken], self.arrived[self.n_taken :]
        self.n_taken = len(self.arrived)
        return without([(0, self.tensor.n_bytes)], before) if self.tensor.whole else union(come)
