"""Why a thread waits for a paged tensor: which lane has yet to do something, and what is in the way.

Looked at while somebody profiles, with the mover's lock held, when a wait begins. What is in the way later, after the
first obstacle has gone, is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.recorder import UNKNOWN_CAUSE, WaitCause
from scheduler.tiers.load_lane import LoadLane

_COMMIT: Final = "commit of "
_UPDATE: Final = "update of "  # what all updates are waited for by
READING: Final = "it was being read"
WRITING: Final = "it was being written"
BEHIND: Final = "its read waited behind another"
MAKING_ROOM: Final = "its place was being written out"
MAKING_ROOM_FIRST: Final = "a read before it waited for its place to be written out"
ARRIVING: Final = "the tensor in its place was still being read"
IN_USE: Final = "its place was in use"
NO_PLACE: Final = "no place was free for it while others were being written out"
COPYING: Final = "it was being copied to the device"
COMING_DOWN: Final = "the device was still copying it down"
UPDATING: Final = "its update had yet to be made"
COMMITTING: Final = "a commit had yet to store it"


@dataclass(slots=True)
class WaitExplainer:
    """Knows tensors by their names; called with the name of one that is waited for, or that of a commit of it.

    Args:
        mover: owner of all residency. lane: the queue of planned loads.
    """

    _mover: Mover
    _lane: LoadLane
    _named: dict[str, PagedTensor] = field(default_factory=dict)

    def __call__(self, name: str) -> WaitCause:
        """What a wait for the tensor named ``name`` has to wait for now. With the mover's lock held."""
        if name.startswith(_UPDATE):
            return WaitCause("update", UPDATING)
        tensor = self._find(name.removeprefix(_COMMIT))
        if tensor is None:
            return UNKNOWN_CAUSE
        if name.startswith(_COMMIT):
            return WaitCause("write", COMMITTING)
        if tensor.updates:
            return WaitCause("update", UPDATING)
        if tensor.id in self._lane:
            return _in_queue(self._mover, self._lane, tensor)
        if tensor.state is Residency.LOADING:
            return WaitCause("read", READING)
        if tensor.state is Residency.STORING:
            return WaitCause("write", WRITING)
        if tensor.state is Residency.ARRIVING:
            return WaitCause("d2h", COMING_DOWN)
        return _no_window(self._mover)

    def _find(self, name: str) -> PagedTensor | None:
        known = self._named.get(name)
        if known is None or self._mover.tensors.get(known.id) is not known:
            self._named = {tensor.name: tensor for tensor in self._mover.tensors.values()}
            known = self._named.get(name)
        return known


class DeviceCauses:
    """Knows what waits for tensors of a device wait for; named as those below, which they are copies of.

    Args:
        device: owner of residency there. below: says it of host memory.
    """

    def __init__(self, device: DeviceMover, below: Callable[[str], WaitCause]) -> None:
        self._device = device
        self._below = below
        with device.changed:
            self._named = {tensor.name: tensor for tensor in device.tensors.values()}

    def __call__(self, name: str) -> WaitCause:
        """What a wait for the tensor named ``name`` has to wait for now. With the lock held of the mover that waits."""
        tensor = self._named.get(name)
        # Without the device's lock, which is taken before the one below: who waits below may have that one.
        if tensor is not None and tensor.state is Residency.LOADING:
            lower = self._device.lower(tensor.id)
            if lower.uploads or lower.readable:
                return WaitCause("h2d", COPYING)
        with self._device.below.changed:
            return self._below(name)


def _in_queue(mover: Mover, lane: LoadLane, tensor: PagedTensor) -> WaitCause:
    """The first queued load cannot start, and the others wait behind it."""
    task = lane.first
    assert task is not None
    first = mover.tensors[task.tensor]
    own = first is tensor
    tenants = lane.tenants(task.frame, first.n_frames)
    if first.frame is not None and first not in tenants:
        tenants.append(first)  # It has to leave one place for another.
    for tenant in tenants:
        if tenant.held:
            return WaitCause("none", IN_USE, tenant.name)
        if tenant.state is Residency.STORING:
            return WaitCause("write", MAKING_ROOM if own else MAKING_ROOM_FIRST, tenant.name)
        if tenant.state is Residency.LOADING:
            return WaitCause("read", ARRIVING if own else BEHIND, tenant.name)
    return UNKNOWN_CAUSE if own else WaitCause("read", BEHIND, first.name)


def _no_window(mover: Mover) -> WaitCause:
    """Nobody has begun to bring it in: the windows of the updater are all busy."""
    storing = next((t for t in mover.tensors.values() if t.state is Residency.STORING), None)
    return UNKNOWN_CAUSE if storing is None else WaitCause("write", NO_PLACE, storing.name)
