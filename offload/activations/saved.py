"""Keeps what autograd saves for the backward pass within a number of bytes: the tensors saved first are recomputed or
offloaded.

    saved ---- has a recipe ---------------------------> freed --unpack--> recomputed -----------> freed
       |------ else, the first of a forward pass ------> waiting --flush--> in pages --unpack--> restored --> freed
       \\------ others: kept until the backward pass has used them ----------------------------------> freed

Tensors with a recipe (`offload.activations.recipes`) cost least and are freed first, as many of the earliest as needed.
If that is not enough, others go to pages: their storage is copied into paged tensors of a few pages each, before the
next layer's weights are used. From there on the plan treats them like everything else: they leave for the SSD after
their only use in the forward pass and come back before their only use in the backward pass. What is saved first is
needed last, which is why it goes.

On a device, storages are downloaded to host pages and uploaded again without synchronising the host: a storage is freed
once compute is ordered behind its download, when younger downloads need the room. One storage is uploaded ahead, while
the device computes with the one saved after it.

How many bytes have to go is known from the pass before: the most that was saved at once, less the limit, and how much
of it had recipes. In the first pass everything goes that can.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from offload import knobs
from offload.activations.recipes import Layout, recipe_of
from offload.activations.saved_storage import (
    AheadOfUse,
    ByteCounts,
    KeptTensor,
    Leaving,
    OffloadedActivation,
    SavedBytes,
    SavedStorage,
    changed_in_place,
)
from pagemem.devices.accelerator import DeviceEvent, has_reached
from pagemem.process.gone import Gone
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind


def chunk_bytes(ram_bytes: int, page_bytes: int) -> int:
    """Bytes of storage in one paged tensor: whole pages, and a small part of the budget."""
    return max(page_bytes, min(knobs.MOST_CHUNK_BYTES, ram_bytes // 64 // page_bytes * page_bytes))


def _graph_is_kept() -> bool:
    """Whether another backward pass may need what is saved: the graph is kept, or no backward pass is under way."""
    return torch._C._current_graph_task_id() == -1 or torch._C._autograd._get_current_graph_task_keep_graph()


class SavedActivations:
    """Keeps one engine's saved tensors. Training thread only; storages may end on any, at any moment.

    Args:
        driver: gives host pages.
        limit_bytes: of saved tensors to keep as they are, including those being downloaded from a device.
        chunk_bytes: of one paged tensor.
        device: what copies between the device and host pages; None: compute is in host memory.
    """

    def __init__(self, driver: Driver, limit_bytes: int, chunk_bytes: int, device: DeviceMover | None = None) -> None:
        self._driver = driver
        self._device = device
        self._leaving_limit_bytes = 0 if device is None else limit_bytes // knobs.LEAVING_SHARE
        self._limit_bytes = limit_bytes - self._leaving_limit_bytes
        self._chunk_bytes = chunk_bytes
        self._leaving: deque[Leaving] = deque()
        self._storages: weakref.WeakValueDictionary[int, SavedStorage] = weakref.WeakValueDictionary()
        self._waiting: deque[weakref.ref[SavedStorage]] = deque()
        self._written: list[weakref.ref[SavedStorage]] = []  # to pages, in order; the last ones are needed first
        self._ahead: AheadOfUse | None = None
        self._pool: dict[int, list[PagedTensor]] = defaultdict(list)
        self._used: set[PagedTensor] = set()
        self._unused: Gone[list[PagedTensor]] = Gone()
        self.bytes = SavedBytes()

    # ---- forward -----------------------------------------------------------------------------------------------

    def pack(self, saved: Tensor) -> KeptTensor | OffloadedActivation:
        """What to hold of a dense saved tensor that is not a weight."""
        storage = saved.untyped_storage()
        if type(saved) is not Tensor or storage.nbytes() < knobs.LEAST_SAVED_BYTES:
            return KeptTensor(saved)
        # The weak reference keeps the address from being another storage's.
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        known = self._storages.get(reference.cdata)
        if known is None or known.version != saved._version:
            recipe = recipe_of(saved, self._layout_of)
            now, expected = self.bytes.now, self.bytes.expected  # nothing is known of a first pass: all that can goes
            repeat = recipe is not None and (expected is None or now.recomputed < expected.saved - self._limit_bytes)
            paged = recipe is None and (
                expected is None or now.paged < expected.saved - self._limit_bytes - expected.repeatable
            )
            known = SavedStorage(self, saved, reference, paged=paged, recipe=recipe if repeat else None)
            n_bytes = known.n_bytes
            counted = ByteCounts(n_bytes, n_bytes * (recipe is not None), n_bytes * repeat, n_bytes * paged)
            self.bytes.count(known, counted)
            self._unused.watch(known, known.chunks)
            self._driver.mover.expire_with(known, known.chunks)
            if known.recipe is not None:
                for read in known.recipe.inputs:
                    if isinstance(read, OffloadedActivation):
                        read.storage.n_views += 1
            self._storages[reference.cdata] = known
            if known.paged:
                self._waiting.append(weakref.ref(known))
        return (
            OffloadedActivation(known, saved) if known.paged or known.recipe is not None else KeptTensor(saved, known)
        )

    def _layout_of(self, packed: object) -> Layout | None:
        if isinstance(packed, KeptTensor):
            return Layout.of(packed.saved)
        return packed.layout if isinstance(packed, OffloadedActivation) and packed.storage.keeper is self else None

    def flush(self) -> None:
        """Copy what waits into pages; called between two ops.

        Raises:
            BudgetError, StorageError: there are no pages for it. It is whole where it is, and waits for the next call.
        """
        while self._waiting:
            storage = self._waiting[0]()
            if storage is not None and storage.original is not None:
                self._write(storage, storage.original)
            self._waiting.popleft()

    def _write(self, storage: SavedStorage, original: Tensor) -> None:
        if original._version != storage.version:
            storage.original, storage.spoiled = None, True
            return
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(original.untyped_storage())
        event: DeviceEvent | None = None
        try:
            for begin in range(0, storage.n_bytes, self._chunk_bytes):
                part = flat[begin : begin + self._chunk_bytes]
                chunk = self._take(part.numel())
                storage.chunks.append(chunk)
                with self._driver.op(
                    (OpKind.FORWARD, ("save", chunk.id)), chunk.name, [Access(chunk.id, AccessMode.CREATE)]
                ):
                    if self._device is None:
                        self._driver.mover.tenants.bytes_of(chunk)[: part.numel()].copy_(part)
                    else:
                        event = self._device.save(part, chunk)
        except BaseException:
            self._give_back(storage)
            if event is not None:  # the copies under way are behind it; the memory may be freed now
                self._follow(event)
            raise
        if event is not None and not has_reached(event):
            self._leaving.append(Leaving(original, weakref.ref(storage), event))
        storage.original = None
        self._written.append(weakref.ref(storage))
        self._let_go(self._leaving_limit_bytes)

    def _give_back(self, storage: SavedStorage) -> None:
        """Discard the chunks of a storage."""
        for chunk in storage.chunks:
            self._used.discard(chunk)
            self._driver.mover.discard_soon(chunk)
        storage.chunks.clear()

    def _let_go(self, limit_bytes: int) -> None:
        """Free storages being downloaded, oldest first, until at most ``limit_bytes`` are left; compute waits for their
        downloads."""
        leaving_bytes = sum(leaving.n_bytes for leaving in self._leaving)
        while leaving_bytes > limit_bytes:
            leaving = self._leaving.popleft()
            self._follow(leaving.event)
            leaving.check()
            leaving_bytes -= leaving.n_bytes

    def _follow(self, event: DeviceEvent) -> None:
        assert self._device is not None
        self._device.accelerator.wait_for(event)

    def _take(self, n_bytes: int) -> PagedTensor:
        """The first paged tensor of this size that is free, so that like steps use the same ones."""
        for chunks in self._unused.take():
            self._used.difference_update(chunks)
        pool = self._pool[n_bytes]
        chunk = next((chunk for chunk in pool if chunk not in self._used), None)
        if chunk is None:
            chunk = self._driver.mover.create(
                f"saved tensor {sum(map(len, self._pool.values()))}", Tag.ACTIVATION, n_bytes
            )
            pool.append(chunk)
        self._driver.mover.end_expiry(chunk)
        self._used.add(chunk)
        return chunk

    # ---- backward ----------------------------------------------------------------------------------------------

    def unpack(self, packed: OffloadedActivation) -> Tensor:
        """The saved tensor, with the values that it had when it was saved.

        Raises:
            RuntimeError: it was changed before it was there.
            BudgetError, StorageError: its pages cannot be brought back; they are whole where they are.
        """
        self.flush()
        self._let_go(0)
        storage = packed.storage
        layout = packed.layout
        if storage.spoiled:
            raise changed_in_place(layout.size)
        if storage.restored is None:
            storage.restored = self._read(storage) if storage.recipe is None else storage.recipe.result(self._input)
            self._read_ahead()
        flat = storage.restored
        storage.n_views -= 1
        if storage.n_views <= 0 and not storage.consumed:
            storage.restored = None  # A second backward reads it again.
        view = torch.empty(0, dtype=layout.dtype, device=storage.device)
        return view.set_(flat.untyped_storage(), packed.offset, layout.size, layout.stride)

    def _input(self, packed: KeptTensor | OffloadedActivation) -> Tensor:
        return packed.unpack() if isinstance(packed, KeptTensor) else self.unpack(packed)

    def _read(self, storage: SavedStorage) -> Tensor:
        """Have a storage whose bytes are in pages back; of a device, compute is put behind its copy."""
        if self._ahead is not None and self._ahead.storage() is storage:
            ahead, self._ahead = self._ahead, None
            self._follow(ahead.event)
            return ahead.flat
        flat, event = self._begin_read(storage)
        if event is not None:
            self._follow(event)
        return flat

    def _read_ahead(self) -> None:
        """On a device: begin to copy up what the backward pass needs next, which was saved before, so that the copy is
        beside what it computes now."""
        self._forget_ahead()
        if self._device is None or self._ahead is not None or _graph_is_kept():
            return
        while self._written:
            storage = self._written[-1]()
            if storage is not None and storage.chunks and not storage.spoiled and storage.restored is None:
                flat, event = self._begin_read(storage)
                if event is not None:
                    self._ahead = AheadOfUse(weakref.ref(storage), flat, event)
                return
            self._written.pop()

    def _forget_ahead(self) -> None:
        """Free what was copied up for nobody."""
        if self._ahead is not None and self._ahead.storage() is None:
            ahead, self._ahead = self._ahead, None
            self._follow(ahead.event)  # the memory is not another's before

    def _begin_read(self, storage: SavedStorage) -> tuple[Tensor, DeviceEvent | None]:
        if storage.consumed:
            raise RuntimeError(
                "what this backward pass needs was given up by one that failed while it was brought back; run the "
                "forward pass again"
            )
        for_good = not _graph_is_kept()
        flat = torch.empty(storage.n_bytes, dtype=torch.uint8, device=storage.device)
        event: DeviceEvent | None = None
        try:
            for number, chunk in enumerate(storage.chunks):
                part = flat[number * self._chunk_bytes :][: self._chunk_bytes]
                with self._driver.op(
                    (OpKind.BACKWARD, ("saved", chunk.id)), chunk.name, [Access(chunk.id, AccessMode.CONSUME)]
                ):
                    if self._device is None:
                        part.copy_(self._driver.mover.tenants.bytes_of(chunk)[: part.numel()])
                    else:
                        event = self._device.restore(chunk, part)
                if for_good:
                    storage.consumed = True
                    self._driver.mover.discard_soon(chunk)
        except BaseException:
            if event is not None:  # of the chunks before: the memory is not another's before
                self._follow(event)
            raise
        if for_good:
            self._used.difference_update(storage.chunks)
            storage.chunks.clear()
        return flat, event
