"""Executes training ops over tensors of the device, and has the tier below bring what is to be copied up.

Two drivers, one above the other, each with a trace and a plan of its own. This one plans which tensors are on the
device; its loads are copies from host memory. The first use of a tensor after a load is an op of the driver below, too,
which reads the tensor there: so the plan below has it in host memory by then, mostly long before, and the copy, which
waits for nothing else, is made as early as that. What the device keeps from one use to the next asks for nothing below,
and neither does what is at home on it.

Ops are timed by the device's own clock: the training thread is ahead of it. For both traces to be the same in every
step, each planned step here has the same moves (`single_step_cycle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from pagemem.frames.page import FrameId, TensorId
from pagemem.process.closing import close_all
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import WaitCause
from scheduler.execution.driver import Driver
from scheduler.execution.wait_explainer import DeviceCauses
from scheduler.planning.trace import Access, AccessMode, OpKey, OpKind


class DeviceDriver(Driver):
    """Gives the training thread its tensors on the device. Training thread only; otherwise as `Driver`.

    Args:
        device: owner of residency on the device.
        below: the driver of host memory; it ends this one's steps with its own.
    """

    single_step_cycle = True
    tells_of_steps = False

    def __init__(self, device: DeviceMover, below: Driver, sink: EventSink) -> None:
        super().__init__(device, sink, device.bandwidth, clock=device.accelerator)
        self.device = device
        self.below = below
        below.above = self
        self._kind = OpKind.FORWARD

    # ---- ops ---------------------------------------------------------------------------------------------------

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Begin an op; see `Driver.begin`.

        Raises:
            DeviceError: the calling thread's compute goes where copies are not ordered with it.
        """
        self.device.accelerator.check()
        self._kind = key[0]
        return super().begin(key, name, accesses)

    def end(self, held: Sequence[PagedTensor]) -> None:
        """End an op; what it edited is written back.

        Raises:
            StorageError: it cannot be: a page file failed. The device still has it.
        """
        super().end(held)
        self._write_back()

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Ops inside are not part of a step, here and below."""
        with self.below.untraced(), super().untraced():
            yield

    def renewed(self, tensor: PagedTensor) -> None:
        """An update has changed what lies below: what the device has of it is dropped, or copied anew where views are
        in use."""
        key = (OpKind.UPDATE, ("renewed", tensor.id))
        with self.op(key, tensor.name, [Access(tensor.id, AccessMode.RENEW)]):
            if not self.device.renew(tensor):
                self._filled_anew(tensor)

    def causes(self) -> Callable[[str], WaitCause]:
        """Who says what a wait has to wait for, here or below."""
        return DeviceCauses(self.device, self.below.causes())

    # ---- tensors that are at home here -------------------------------------------------------------------------

    def settle(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Have a tensor in the free frames from ``frame`` on for good, as it is below. Updates of it are made here from
        then on.

        Raises:
            StorageError: it cannot be read, or the device fails; the tensor is whole below.
        """
        with self.untraced(), self._below_has([tensor.id], tensor.name):
            self.device.start_load(tensor, frame)
            self.device.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
            self.device.monitor.check()
            self.device.wait_for(tensor)
        self.device.prefetched_unused.discard(tensor.id)
        tensor.resident = True

    def settle_empty(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Have a new tensor, of which there is nothing below and never will be, in the free frames from ``frame`` on
        for good."""
        self.device.start_load(tensor, frame, fresh=True)
        self.device.prefetched_unused.discard(tensor.id)
        tensor.resident = True

    def bring_down(self) -> None:
        """Between two steps: have below what has changed in tensors that are at home here, and what may have through
        views in use.

        Raises:
            StorageError: a page file failed, or has no room for what has to give way. DeviceError: the calling thread's
                compute goes where this would not be ordered with it. The device has everything.
        """
        with self.untraced():
            for tensor in list(self.device.tensors.values()):
                if (
                    tensor.id in self.device.edited
                    or tensor.id in self.device.changed_resident
                    or (tensor.may_be_aliased and tensor.readable)
                ):
                    self._written_back(tensor, AccessMode.CREATE)

    def bring_up(self) -> None:
        """Between two steps: what is below of tensors that are at home here is what they are to be.

        Raises:
            StorageError: one cannot be read; DeviceError: as `bring_down`. It and those after it are as they were.
        """
        with self.untraced():
            for tensor in [
                tensor for tensor in self.device.tensors.values() if tensor.resident and self.device.mirrors(tensor)
            ]:
                self._filled_anew(tensor)
                if tensor.id in self.device.changed_resident:
                    self.device.written_back(tensor)

    def quiesce(self) -> None:
        """Stop copying ahead and wait until no copy is under way, also after an error. What was edited until now is
        written back."""

        def collect() -> None:
            with self.device.changed:
                self._collect_views()

        close_all(collect, super().quiesce)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _below_has(
        self, tensors: Sequence[TensorId], name: str, mode: AccessMode = AccessMode.READ
    ) -> AbstractContextManager[None]:
        """Have tensors in host memory inside the block, as one op there."""
        lower = [self.device.lower(tensor) for tensor in tensors]
        key = (self._kind, (mode.value, *(tensor.id for tensor in lower)))
        return self.below.op(key, name, [Access(tensor.id, mode) for tensor in lower])

    def _filled_anew(self, tensor: PagedTensor) -> None:
        """Copy what is below into the frames that a tensor has."""
        self.device.accelerator.check()
        with self._below_has([tensor.id], tensor.name):
            self.device.tenants.bytes_of(tensor).copy_(self.below.mover.tenants.bytes_of(self.device.lower(tensor.id)))

    def _write_back(self) -> None:
        for tensor in list(self.device.edited.values()):
            self._written_back(tensor, AccessMode.MODIFY)

    def _written_back(self, tensor: PagedTensor, mode: AccessMode) -> None:
        self.device.accelerator.check()
        with self._below_has([tensor.id], tensor.name, mode):
            self.below.mover.tenants.bytes_of(self.device.lower(tensor.id)).copy_(self.device.tenants.bytes_of(tensor))
        self.device.written_back(tensor)

    def _collect_views(self) -> None:
        super()._collect_views()
        self._write_back()

    def _follow(self, key: OpKey) -> None:
        if not self._recorder.ops:
            # What the device still has, and from when, differs from step to step; what is asked for below must not.
            self.device.prefetched_unused.update(
                t.id for t in self.device.tensors.values() if t.frame is not None and not t.resident
            )
        super()._follow(key)

    def _make_usable(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        if (
            tensor.id not in self.device.prefetched_unused
            and self._usable(tensor, mode)
            and tensor.id not in self._lane
        ):
            return
        with self._below_has([tensor.id], name):
            super()._make_usable(tensor, mode, name)
        self.device.prefetched_unused.discard(tensor.id)
        self.device.wait_for(tensor)

    def _hold_packed(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        tensors = [access.tensor for access in accesses if not self.device.tensors[access.tensor].resident]
        with self._below_has(tensors, name):
            held = super()._hold_packed(name, accesses)
        self.device.prefetched_unused.difference_update(tensors)
        for tensor in held:
            self.device.wait_for(tensor)
        return held

    def _leave_plan(self, why: str | None) -> None:
        super()._leave_plan(why)
        self.device.take_back_loads()

    def _disturb(self) -> None:
        super()._disturb()
        self.device.take_back_loads()
