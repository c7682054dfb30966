"""The updater's own part of host memory: windows through which slices of optimizer states stream, in cyclic order.

The updater goes round the units, so a slice is needed again only after all others. For such an order the best that can
be kept in memory is a fixed set: as many slices as fit stay for good, and the others pass through a ring of
`RING_WINDOWS` windows, in which one slice is read and one is written while a third is updated.

The windows lie above the frames that the schedule of the training thread uses; nothing else allocates there. All
methods belong to the updater's thread; the mover's lock is held for bookkeeping only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import IN_FLIGHT, PagedTensor, Residency
from pagemem.telemetry.events import EventKind

#: In one a slice is read, in one a slice is updated, and in one it is written.
RING_WINDOWS: Final = 3

#: The paged tensors of one slice, which are always in memory together.
SliceTensors = tuple[PagedTensor, ...]


def least_frames(sizes: Sequence[int]) -> int:
    """Frames with which slices of these numbers of frames can stream: all of them, where they are few."""
    return min(sum(sizes), RING_WINDOWS * max(sizes, default=0))


@dataclass(slots=True)
class _RingWindow:
    first: FrameId
    tenant: int | None = None


class StateWindows:
    """Brings slices in and out.

    Args:
        mover: owner of all residency.
        slices: every slice's tensors, in the order in which the updater usually goes round.
        first_frame: where the updater's frames begin.
        n_frames: how many there are, at least `least_frames`.
    """

    def __init__(self, mover: Mover, slices: Sequence[SliceTensors], first_frame: int, n_frames: int) -> None:
        self._mover = mover
        self._slices = list(slices)
        sizes = [sum(tensor.n_frames for tensor in tensors) for tensors in slices]
        ring_frames = 0 if sum(sizes) <= n_frames else RING_WINDOWS * max(sizes)
        self._resident: dict[int, FrameId] = {}
        end = first_frame
        for number, size in enumerate(sizes):
            if end + size + ring_frames <= first_frame + n_frames:
                self._resident[number] = FrameId(end)
                end += size
        self._ring = [_RingWindow(FrameId(end + k * max(sizes))) for k in range(RING_WINDOWS)] if ring_frames else []
        self._wanted: set[int] = set()
        self.n_frames = end - first_frame + ring_frames

    @property
    def resident(self) -> frozenset[int]:
        """Numbers of the slices that stay for good."""
        return frozenset(self._resident)

    def prefetch(self, number: int) -> None:
        """Begin to bring in a slice that will be needed soon, if a window is free.

        Raises:
            StorageError: a slice that has to leave could not be stored; it is still whole in host memory.
        """
        self._begin(number, needed=False)

    def _begin(self, number: int, *, needed: bool) -> bool:
        """Begin to bring a slice in, if a window is free; returns whether it is there or under way."""
        tensors = self._slices[number]
        with self._mover.changed:
            resident = self._resident.get(number)
            if resident is not None:
                return self._place(tensors, resident)
            window = next((w for w in self._ring if w.tenant == number), None) or self._free_window(needed=needed)
            if window is None:
                return False
            window.tenant = number
            if not self._place(tensors, window.first):
                return False
            self._wanted.add(number)
            return True

    @contextmanager
    def held(self, number: int, following: int | None = None) -> Iterator[None]:
        """Have a slice in host memory, to be changed, inside the block; what passes through is stored afterwards.

        Args:
            following: a slice that will be needed soon, brought in if a window is free.

        Raises:
            StorageError: it cannot be read, or what has to leave cannot be stored; every slice is whole where it was.
        """
        tensors = self._slices[number]
        if not tensors:
            yield
            return
        name, n_bytes = tensors[0].name, sum(tensor.n_bytes for tensor in tensors)

        begun = False

        def there() -> bool:
            # The training thread may take one away again before all are there: a master whose parameter was edited.
            # What has failed is not tried for ever.
            nonlocal begun
            if not (begun and self._mover.monitor.failed):
                begun = self._begin(number, needed=True)
            return begun and not any(tensor.state in IN_FLIGHT for tensor in tensors)

        with self._mover.changed:
            self._mover.monitor.wait_until(there, name, n_bytes, EventKind.UPDATE_WAIT)
            if not all(tensor.readable for tensor in tensors):
                raise StorageError(f"{name} could not be read")
            for tensor in tensors:
                tensor.pins += 1
            try:
                for tensor in tensors:
                    self._mover.make_writable(tensor)
                    self._mover.touch(tensor)
                if following is not None:
                    self._begin(following, needed=False)
            except BaseException:
                self._let_go(number)
                raise
        try:
            yield
        finally:
            with self._mover.changed:
                self._let_go(number)

    def _let_go(self, number: int) -> None:
        """Unpin a slice, and begin to store what passes through."""
        self._wanted.discard(number)
        for tensor in self._slices[number]:
            tensor.pins -= 1
            if number not in self._resident and tensor.state is Residency.DIRTY:
                self._mover.start_store(tensor, background=True)

    def _free_window(self, *, needed: bool) -> _RingWindow | None:
        """A window whose tenant has left. What was brought in early leaves only for a slice that is needed now."""
        early = [window for window in self._ring if window.tenant in self._wanted]
        others = [window for window in self._ring if window.tenant not in self._wanted]
        for window in [*others, *early] if needed else others:
            if window.tenant is None or self._leave(self._slices[window.tenant]):
                self._wanted.discard(-1 if window.tenant is None else window.tenant)
                return window
        return None

    def _place(self, tensors: SliceTensors, first: FrameId) -> bool:
        """Start loading what is not at its place yet; False while one is elsewhere and cannot leave."""
        frame = first
        for tensor in tensors:
            if tensor.frame is not None and tensor.frame != frame and not self._leave((tensor,)):
                return False
            if tensor.frame is None:
                self._mover.start_load(tensor, frame, background=True)
            frame = FrameId(frame + tensor.n_frames)
        return True

    def _leave(self, tensors: SliceTensors) -> bool:
        """Have tensors give up their frames, if they can now."""
        if any(tensor.held or tensor.state in IN_FLIGHT for tensor in tensors):
            return False
        if self._mover.monitor.failed:
            # Nothing is begun after a failed copy until somebody knows: the same could fail for ever.
            self._mover.monitor.check()
        stored = True
        for tensor in tensors:
            if tensor.state is Residency.DIRTY:
                self._mover.start_store(tensor, background=True)
                stored = False
        if stored:
            for tensor in tensors:
                if tensor.state is Residency.CLEAN:
                    self._mover.drop(tensor)
        return stored
