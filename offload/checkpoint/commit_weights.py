"""The weights of a commit under the names of ``model.state_dict()``, read from the page files piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.safetensors_writer import Weight
from offload.commits.sidecar import Sidecar
from offload.commits.stored_layout import StoredSlot
from offload.commits.stored_values import MASTER, VALUES, StoredValues
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError, OffloadError
from pagemem.units import KiB

#: Supported dtypes; "keep" is what the parameters were computed in.
DTYPES: Final[dict[str, torch.dtype | None]] = {
    "keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
#: Elements of a parameter that are in memory at a time.
PIECE_NUMEL: Final = 256 * KiB


class ExportError(OffloadError):
    """A commit cannot be exported as asked, or not to that place. Nothing was changed."""


class CommitWeights:
    """The tensors of a commit, under the names of ``model.state_dict()``, and their bytes piece by piece.

    Args:
        values: of the parameters.
        manifest: of the first part, which has the names of all.
        sidecar: the small tensors beside the manifest. Both are open as long as this is used.
        dtype: of the paged parameters; None: as they were computed in. Buffers keep their own.

    Attributes:
        tied: further names, each with the one under which the tensor is.

    Raises:
        CommitError: slices of a parameter do not follow one another.
    """

    def __init__(self, values: StoredValues, manifest: Manifest, sidecar: Sidecar, dtype: torch.dtype | None) -> None:
        self._values = values
        self._manifest = manifest
        self._sidecar = sidecar
        self._dtype = dtype
        self._state = values.states[0]
        self.tied = {name: kept for name, kept in self._state.names.items() if name != kept}
        kept = set(self._state.names.values())
        self._paged: dict[str, list[StoredSlot]] = {}
        for unit in self._state.units:
            for slot in unit.slots:
                if slot.whole in kept:
                    self._paged.setdefault(slot.whole, []).append(slot)
        for name, slots in self._paged.items():
            if not _follow_one_another(slots):
                raise CommitError(f"commit {manifest.number} is damaged: slices of {name} do not follow one another")

    def listed(self) -> list[Weight]:
        """All of them, in the order of the names.

        Raises:
            CommitError: the commit does not have one.
        """
        found = []
        for name in dict.fromkeys(self._state.names.values()):
            if name in self._paged:
                slot = self._paged[name][0]
                shape = slot.shape
                if slot.of is not None:
                    shape = (sum(part.shape[0] for part in self._paged[name]), *slot.shape[1:])
                found.append(Weight(name, self._dtype or self._values.dtype(name), shape))
            elif (small := self._sidecar.tensors.get(name)) is not None:
                found.append(Weight(name, small.dtype, tuple(small.shape)))
            else:
                raise CommitError(f"commit {self._manifest.number} has no {name} that can be exported")
        return found

    def pieces(self) -> Iterator[tuple[str, int, memoryview]]:
        """Name, offset and bytes of each piece.

        Raises:
            ChecksumError: a page does not hold what was written; names the tensor, the file and the frame.
            StorageError: a file cannot be read.
            ExportError: a value cannot be expressed in the dtype.
        """
        for name in dict.fromkeys(self._state.names.values()):
            if name in self._sidecar.tensors:
                for begin, piece in self._sidecar.pieces(name):
                    yield name, begin, piece
        for name, slots in self._paged.items():
            numel = slots[-1].first + slots[-1].end - slots[-1].offset
            for begin in range(0, numel, PIECE_NUMEL):
                values = self._piece(name, begin, min(PIECE_NUMEL, numel - begin))
                yield name, begin * values.element_size(), values.view(torch.uint8).numpy().data

    def _piece(self, name: str, begin: int, numel: int) -> Tensor:
        source = self._values.dtype(name)
        piece = torch.empty(numel, dtype=source)
        self._values.read(name, VALUES, begin, piece)
        if self._dtype in (None, source):
            return piece
        assert self._dtype is not None
        wide = None
        if self._values.has(name, MASTER):
            wide = torch.empty(numel, dtype=torch.float32)
            self._values.read(name, MASTER, begin, wide)
        return _converted(name, piece, wide, self._dtype)


def _follow_one_another(slots: Sequence[StoredSlot]) -> bool:
    """Whether slots are one parameter, or all slices of one in order."""
    if slots[0].of is None:
        return len(slots) == 1
    row, inner = 0, slots[0].shape[1:]
    for slot in slots:
        if slot.of is None or not slot.shape or slot.first_row != row or slot.shape[1:] != inner:
            return False
        row += slot.shape[0]
    return True


def _converted(name: str, values: Tensor, masters: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, from their masters, except where they were edited since those were made."""
    exact = values
    if masters is not None:
        exact = torch.where(masters.to(values.dtype) == values, masters, values.float())
    if exact.dtype is dtype:
        return exact
    converted = exact.to(dtype)
    if bool((torch.isinf(converted) & torch.isfinite(exact)).any()):
        raise ExportError(
            f"{name} has values beyond the largest of {dtype}, {torch.finfo(dtype).max:g}; export as bf16 or fp32"
        )
    return converted
