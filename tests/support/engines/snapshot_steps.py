"""Moves of a snapshot behind gates."""

from __future__ import annotations

from concurrent.futures import Future

from gated_mover import Gates

from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.snapshot import Snapshot

R = Residency


def begin(gates: Gates, *tensors: PagedTensor) -> Snapshot:
    with gates.mover.changed:
        return gates.mover.snapshots.begin(tensors)


def change(gates: Gates, tensor: PagedTensor, value: int) -> None:
    """What an op of the training thread does."""
    with gates.mover.changed:
        gates.mover.make_writable(tensor)
        gates.fill(tensor, value)


def changing(gates: Gates, tensor: PagedTensor, value: int) -> Future[None]:
    return gates.training.submit(change, gates, tensor, value)


def content(gates: Gates, snapshot: Snapshot) -> dict[str, int]:
    """What the page files hold now for each tensor of a snapshot, of which each must be of one value."""
    found = {}
    for tensor, stored in snapshot.copies.items():
        held = b"".join(
            gates.files.content[extent.frame, extent.offset_bytes] for extent in stored.placement.extents(65536)
        )
        assert held == held[:1] * len(held), "a copy is torn"
        found[gates.mover.tensors[tensor].name] = held[0]
    return found


def store_next(gates: Gates) -> None:
    gates.files.take("write").open()


def several(gates: Gates, count: int) -> list[PagedTensor]:
    return [gates.dirty(10 + i, frame=i, name=f"t{i}") for i in range(count)]
