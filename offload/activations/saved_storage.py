"""Tensors that autograd has saved for the backward pass, and the storages behind them: what is known of each, how far
it is gone, and how many bytes there are.

Who keeps which of them, and why, is `offload.activations.saved`'.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from operator import add, sub
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from offload.activations.recipes import Layout, Recipe
from pagemem.devices.accelerator import DeviceEvent
from pagemem.process.gone import Gone
from pagemem.residency.paged_tensor import PagedTensor


class SavedStorage:
    """The bytes behind one or more saved tensors.

    Attributes:
        keeper: whose it is. original: one of the tensors, while they are to go to pages and are not there yet.
        spoiled: they were changed before they got there.
        chunks: paged tensors that hold them, in order.
        consumed: they are being, or have been, restored and their pages discarded.
        recipe: how to recompute them; None if they are not to be.
        n_views: saved tensors, and inputs of recipes, that the backward has not asked for yet.
    """

    __slots__ = (
        "__weakref__",
        "chunks",
        "consumed",
        "device",
        "keeper",
        "n_bytes",
        "n_views",
        "original",
        "recipe",
        "reference",
        "restored",
        "spoiled",
        "version",
    )

    def __init__(
        self, keeper: object, saved: Tensor, reference: StorageWeakRef, *, paged: bool, recipe: Recipe | None
    ) -> None:
        self.keeper = keeper
        self.reference = reference
        self.version = saved._version
        self.n_bytes = saved.untyped_storage().nbytes()
        self.device = saved.device
        self.original = saved.detach() if paged else None
        self.spoiled = False
        self.chunks: list[PagedTensor] = []
        self.consumed = False
        self.recipe = recipe
        self.restored: Tensor | None = None
        self.n_views = 0

    @property
    def paged(self) -> bool:
        """Whether its bytes are in pages, were there, or are to go there."""
        return self.original is not None or self.spoiled or bool(self.chunks) or self.consumed


def changed_in_place(shape: torch.Size) -> RuntimeError:
    """The error for a saved tensor that is not what it was."""
    return RuntimeError(
        f"a tensor of shape {tuple(shape)} that the backward pass needs was changed by an inplace operation after it "
        "was saved, so its gradient would be wrong; use the operation that makes a new tensor"
    )


class KeptTensor:
    """A saved tensor that stays as it is. Under hooks torch does not look whether it was changed; this does.

    Attributes:
        storage: counts it, where anybody counts.
    """

    __slots__ = ("saved", "storage", "version")

    def __init__(self, saved: Tensor, storage: SavedStorage | None = None) -> None:
        # Held as it is, an op's result would keep the op, which keeps us, alive for ever.
        self.saved = saved.detach()
        self.storage = storage
        self.version = saved._version

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place since it was saved, so the gradient would be wrong.
        """
        if self.saved._version != self.version:
            raise changed_in_place(self.saved.shape)
        return self.saved


class OffloadedActivation:
    """A saved tensor's place in a storage that is freed: it goes to pages or is recomputed."""

    __slots__ = ("layout", "offset", "storage")

    def __init__(self, storage: SavedStorage, saved: Tensor) -> None:
        self.storage = storage
        self.layout, self.offset = Layout.of(saved), saved.storage_offset()
        storage.n_views += 1


@dataclass(frozen=True, slots=True)
class Leaving:
    """A storage that is being downloaded from a device, and one of the tensors in it."""

    original: Tensor
    storage: weakref.ref[SavedStorage]
    event: DeviceEvent

    @property
    def n_bytes(self) -> int:
        """Of the storage."""
        return self.original.untyped_storage().nbytes()

    def check(self) -> None:
        """Once compute is ordered behind the copy: if the storage was changed before, the copy cannot be trusted."""
        storage = self.storage()
        if storage is not None and self.original._version != storage.version:
            storage.spoiled = True


@dataclass(frozen=True, slots=True)
class AheadOfUse:
    """A storage that is being uploaded to a device before it is needed, and the memory that it comes to, which is kept
    until compute is put behind the event."""

    storage: weakref.ref[SavedStorage]
    flat: Tensor
    event: DeviceEvent


class ByteCounts(NamedTuple):
    """Bytes of storages: of all saved ones, those with a recipe, those freed and recomputed, those that go to pages."""

    saved: int = 0
    repeatable: int = 0
    recomputed: int = 0
    paged: int = 0


class SavedBytes:
    """Counts the storages of one engine. Training thread only; they may end on any, at any moment.

    Attributes:
        ever_bytes: of all that was ever counted.
        expected: when most were saved in the pass before; None in the first one.
    """

    def __init__(self) -> None:
        self.ever_bytes = 0
        self.expected: ByteCounts | None = None
        self._now = self._peak = ByteCounts()
        self._gone: Gone[ByteCounts] = Gone()

    @property
    def now(self) -> ByteCounts:
        """Of the storages that are not gone."""
        for counted in self._gone.take():
            self._now = ByteCounts(*map(sub, self._now, counted))
            if not self._now.saved:
                self.expected, self._peak = self._peak, ByteCounts()
        return self._now

    def count(self, storage: object, counted: ByteCounts) -> None:
        """Count a storage until it is gone."""
        self._now = ByteCounts(*map(add, self.now, counted))
        self._gone.watch(storage, counted)
        self.ever_bytes += counted.saved
        if self._now.saved > self._peak.saved:
            self._peak = self._now
