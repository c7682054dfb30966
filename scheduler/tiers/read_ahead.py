"""Reading ahead of ops that are fetched on demand: in the first step, in evaluation and in generation.

Nobody knows what such ops want next, but passes over a model mostly go through its tensors in its own order, or
backwards. Where the last uses of a kind of tensor went one way, what comes next that way is loaded while the present
tensor is waited for and used.

    uses so far    A  B  C            now C is wanted
    begun          C, then D and E    as far as the limit goes; F is begun once D is used

What is begun in vain costs a read and no more: such a load takes free frames, or those of clean tensors that nobody
holds, used longest ago. It never stores anything, and what is wanted at once may take its frames away again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag
from scheduler import knobs


class ReadAhead:
    """Begins loads of what ops are going to want. Training thread only, with the mover's lock held; never waits.

    Args:
        mover: owner of all residency.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._orders: dict[Tag, list[PagedTensor]] = {}
        self._places: dict[TensorId, int] = {}  # in the order of the tensor's tag
        self._last_uses: dict[TensorId, int] = {}
        self._n_uses = 0
        self._begun: dict[TensorId, int] = {}  # not used since; at which use it was begun
        self._own: frozenset[TensorId] = frozenset()
        self._pauses = False

    def set_order(self, tensors: Iterable[PagedTensor]) -> None:
        """Tensors in the order in which passes go through them, each tag by itself; others, and those of another mover,
        are not read ahead."""
        self._orders, self._places = {}, {}
        for tensor in tensors:
            if self._mover.tensors.get(tensor.id) is not tensor or tensor.id in self._mover.gathered:
                continue  # a state that stays on the device: ids are unique within a mover only; or all ranks' matter
            order = self._orders.setdefault(tensor.tag, [])
            self._places[tensor.id] = len(order)
            order.append(tensor)

    def op_begins(self, tensors: Iterable[TensorId], *, pauses: bool = False) -> None:
        """An op is going to use these: nothing that is read ahead takes their frames until the next one begins. Where
        it ``pauses``, nothing is begun for it."""
        self._own, self._pauses = frozenset(tensors), pauses

    def follow(self, tensor: PagedTensor) -> None:
        """A tensor is used, and there or on its way: begin loads of those that are likely to come next."""
        if tensor.id not in self._places:
            return
        self._n_uses += 1
        self._last_uses[tensor.id] = self._n_uses
        self._begun.pop(tensor.id, None)
        # After a failed copy nothing is begun until the training thread knows: the same could fail for ever.
        if self._pauses or self._mover.monitor.failed:
            return
        order, place = self._orders[tensor.tag], self._places[tensor.id]
        upwards, downwards = self._came_from(order, place, -1), self._came_from(order, place, 1)
        if upwards != downwards:
            self._load_beyond(order, place, 1 if upwards > downwards else -1)

    def _came_from(self, order: Sequence[PagedTensor], place: int, side: int) -> int:
        """When the neighbour on one side was used, if the uses before this one came from there; else 0."""
        if not 0 <= place + 2 * side < len(order):
            return 0
        nearest, beyond = (self._last_uses.get(order[place + side * n].id, 0) for n in (1, 2))
        is_recent = self._n_uses - knobs.RECENT_USES <= beyond < nearest and beyond > 0
        return nearest if is_recent else 0

    def _load_beyond(self, order: Sequence[PagedTensor], place: int, step: int) -> None:
        """Begin loads of the tensors behind ``place``, the nearest first, until the limit or as frames can be had."""
        tensors, limit_frames = self._mover.tensors, self._mover.tenants.n_shared_frames // knobs.READ_AHEAD_PART
        self._forget_stale()
        begun_frames = sum(tensors[begun].n_frames for begun in self._begun if tensors[begun].frame is not None)
        kept, passed_frames = set(self._own), 0
        for distance in range(1, knobs.READ_AHEAD_TENSORS + 1):
            if not 0 <= place + distance * step < len(order):
                return
            tensor = order[place + distance * step]
            passed_frames += tensor.n_frames
            if tensor.id not in tensors or passed_frames > limit_frames:
                return
            kept.add(tensor.id)
            if tensor.frame is not None or tensor.state is not Residency.STORED or tensor.id in self._begun:
                continue
            if begun_frames + tensor.n_frames > limit_frames or not self._begin(tensor, kept):
                return
            begun_frames += tensor.n_frames

    def _forget_stale(self) -> None:
        """Have what was begun long ago and never used count as any other tenant: uses went another way."""
        oldest, tensors = self._n_uses - knobs.STALE_USES, self._mover.tensors
        self._begun = {tensor: begun for tensor, begun in self._begun.items() if begun >= oldest and tensor in tensors}

    def _begin(self, tensor: PagedTensor, kept: set[TensorId]) -> bool:
        """Begin one load, if its frames can be had for nothing; ``kept`` do not leave for it."""
        mover, tensors = self._mover, self._mover.tensors

        def leaves(tenant: TensorId) -> bool:
            clean = tensors[tenant].state is Residency.CLEAN and mover.tenants.droppable(tenant)
            clean = clean and not tensors[tenant].updates
            return clean and tenant not in kept and tenant not in self._begun

        def cost(tenants: Sequence[TensorId]) -> int:
            return max((tensors[tenant].last_use for tenant in tenants), default=-1)

        if mover.expires(tensor):
            return False
        window = mover.tenants.choose(tensor.n_frames, cost, lambda tenant: tensors[tenant].last_use, leaves)
        if window is None:
            return False
        for tenant in window.tenants:
            mover.drop(tensors[tenant])
        tensor.tentative = True
        mover.start_load(tensor, window.first, background=True)
        # What is wanted at once takes the frames of what was used longest ago, and not these.
        mover.tenants.used(tensor, mover.tenants.latest_use)
        self._begun[tensor.id] = self._n_uses
        return True
