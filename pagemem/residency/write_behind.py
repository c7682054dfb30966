"""Storing behind ops that are fetched on demand: in the first steps nobody knows what comes next, but what was changed
longest ago leaves first where memory is short.

Without this, an op that needs room waits until what is to leave has been stored, and while it computes nothing is
written. So what was used longest ago is kept clean: whoever needs the frames takes them at once, and so do loads ahead,
which store nothing.

    by their last use    A  B  C  D  E  F  G  H    all dirty
    begun                A  B                      a quarter of the frames; they stay where they are, and become clean

Where all tensors fit, nothing has to leave, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagemem import knobs
from pagemem.errors import DiskFullError
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag


class WriteBehind:
    """Begins stores of what is going to leave. Training thread only; never waits.

    Args:
        mover: owner of all residency.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._changed_frames = 0
        self._n_known = 0
        self._is_short = False

    def changed(self, tensors: Iterable[PagedTensor]) -> None:
        """An op that has changed these is over."""
        self._changed_frames += sum(tensor.n_frames for tensor in tensors)
        if self._changed_frames * knobs.WRITE_BEHIND_LOOKS < self._mover.tenants.n_shared_frames:
            return
        self._changed_frames = 0
        with self._mover.changed:
            # After a failed copy nothing is begun until the training thread knows.
            if self._short() and not self._mover.monitor.failed:
                self._clean()

    def _short(self) -> bool:
        """Whether there is no room for all tensors. Gradients are not kept from step to step."""
        tensors, n_frames = self._mover.tensors, self._mover.tenants.n_shared_frames
        if len(tensors) != self._n_known:
            self._n_known = len(tensors)
            lasting = (tensor.n_frames for tensor in tensors.values() if tensor.tag is not Tag.GRAD)
            self._is_short = sum(lasting) > n_frames
        return self._is_short

    def _clean(self) -> None:
        """Begin to store what is dirty among the tenants that leave first."""
        tenants = self._mover.tenants
        left_frames = tenants.n_shared_frames // knobs.WRITE_BEHIND_PART - self._mover.host.free_frames
        for tensor in map(self._mover.tensors.__getitem__, tenants.by_use()):
            if left_frames <= 0:
                return
            if tensor.held or tensor.updates or self._mover.expires(tensor):
                continue
            left_frames -= tensor.n_frames
            if tensor.state is Residency.DIRTY:
                try:
                    self._mover.start_store(tensor)
                except DiskFullError:
                    return  # Whoever needs the frames says so, before anything is changed for it.
