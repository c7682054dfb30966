"""A rig for each rank, whose units are cut into shards: ops are written as for `training_rig.Rig`.

A, B, C, D are the shards of parameters of the own rank, P, Q, R, S what is gathered from them. Of gradients, U, V, W, T
are those of the whole units, G, H, I, J the own shards of their sums: ``"Ux Gs"`` has the sum over all ranks of U come
to G. X, Y, Z are of the rank alone. Small letters are on the device: a to d copies of shards, p to s gathered from
those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from fake_ranks import Meeting, MemoryCollectives, on_all_ranks
from training_rig import MODES, PAGE_BYTES, Rig, pattern

from pagemem.errors import OffloadError
from pagemem.ranks.collectives import ShardLayout
from pagemem.ranks.comm_lane import CommLane
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from scheduler.planning.task import TaskKind
from scheduler.planning.trace import Access, AccessMode, OpKind

SHARDS, WHOLES, SUMS, GRADIENTS, OWN = "ABCD", "PQRS", "GHIJ", "UVWT", "XYZ"
BLOCK = 1024


def cut(numel: int, n_ranks: int, first: int) -> ShardLayout:
    """Ranges that are not of one length: rank ``first`` has the most."""
    blocks = [numel // BLOCK // n_ranks] * n_ranks
    blocks[first % n_ranks] += numel // BLOCK - sum(blocks)
    ends = [sum(blocks[: rank + 1]) * BLOCK for rank in range(n_ranks)]
    return ShardLayout(torch.int32, tuple(zip([0, *ends], ends, strict=False)))


class RankRig(Rig):
    """One rank.

    Args:
        n_units: units, of ``unit_pages`` pages each.
    """

    def __init__(
        self, meeting: Meeting, rank: int, n_frames: int, n_units: int = 3, unit_pages: int = 2, device_frames: int = 0
    ) -> None:
        super().__init__(n_frames, OWN, None, device_frames)
        self.rank, self.n_ranks = rank, meeting.n_ranks
        self.lane = CommLane(MemoryCollectives(meeting, rank), self.log)
        self.driver.add_ranks(self.lane)
        self.layouts: dict[str, ShardLayout] = {}
        numel = unit_pages * PAGE_BYTES // 4
        for unit in range(n_units):
            layout = cut(numel, meeting.n_ranks, unit)
            for letter in (SHARDS[unit], SUMS[unit]):
                self._add(letter, self.mover.create(letter, Tag.PARAM, layout.shard_bytes), layout)
            self._add(GRADIENTS[unit], self.mover.create(GRADIENTS[unit], Tag.GRAD, layout.n_bytes))
            shard = self.tensors[SHARDS[unit]]
            if self.device is None:
                self._gathered(unit, self.mover.gathered.add(shard, WHOLES[unit], Tag.PARAM, layout), shard)
            else:
                copy = self.device.mirror(shard)
                self._add(SHARDS[unit].lower(), copy, layout)
                self.salts[copy.id] = 0
                name = WHOLES[unit].lower()
                self._gathered(unit, self.device.gathered.add(copy, name, Tag.PARAM, layout), shard)

    def _add(self, letter: str, tensor: PagedTensor, layout: ShardLayout | None = None) -> None:
        self.tensors[letter] = tensor
        self.salts[tensor.id] = 0
        if layout is not None:
            self.layouts[letter] = layout

    def _gathered(self, unit: int, whole: PagedTensor, shard: PagedTensor) -> None:
        letter = WHOLES[unit] if self.device is None else WHOLES[unit].lower()
        self.tensors[letter] = whole
        self._shard_of = {**getattr(self, "_shard_of", {}), whole.id: shard}

    def check(self, tensor: PagedTensor, when: str = "") -> None:
        """The bytes are what all ranks wrote last."""
        letter = next(letter for letter, known in self.tensors.items() if known is tensor)
        origin = self._shard_of.get(tensor.id, tensor)
        salt = self.salts[self.driver.memories.in_host(origin.id)]
        layout, seen = self.layouts.get(letter), self.view(tensor)
        if layout is None:
            wanted = pattern(tensor.n_bytes, salt)
        else:
            wanted = self._part(letter, salt)
            seen = layout.own(seen, self.rank)
        wanted = wanted * (self.rank + 1) if letter.upper() in GRADIENTS + OWN else wanted
        assert torch.equal(seen, wanted), f"rank {self.rank}, {when}: {tensor.name} holds something else"

    def _part(self, letter: str, salt: int) -> torch.Tensor:
        """What the own rank has of a unit, or of the sum of its gradients."""
        layout = self.layouts[letter]
        n_added = sum(range(1, self.n_ranks + 1)) if letter in SUMS else 1
        return layout.part(pattern(layout.n_bytes, salt) * n_added, self.rank)

    def write(self, tensor: PagedTensor) -> None:
        """Write a new pattern: the own part of it, or one that other ranks do not have."""
        self._salt += 1
        self.salts[tensor.id] = self._salt
        layout = self.layouts.get(tensor.name)
        if layout is None:
            self.view(tensor).copy_(pattern(tensor.n_bytes, self._salt) * (self.rank + 1))
        else:
            own = self._part(tensor.name, self._salt)
            layout.own(self.view(tensor), self.rank).copy_(own)
        self._consumed.discard(tensor.name)

    def _changed(self, letter: str) -> None:
        if letter.lower() in self.tensors:
            super()._changed(letter)

    def op(self, text: str) -> None:
        """As `Rig.op`."""
        words = text.removeprefix("u: ").split()
        for word in words:
            if word[0] in self._consumed and word[1] not in "cs":
                self.op(f"{word[0]}c")  # nobody knows what is in it
        for word in words:
            tensor = self.tensors[word[0]]
            self.driver.mover_of(tensor).end_expiry(tensor)  # of a gradient whose sum is still being made
        if not any(word[1] == "s" for word in words):
            super().op(text)
            return
        whole, shard = (self.tensors[word[0]] for word in words)
        accesses = [
            Access(whole.id, MODES["x"]),
            Access(shard.id, AccessMode.CREATE, via=TaskKind.REDUCE_SCATTER),
        ]
        with self.driver.op((OpKind.GRADIENT, text), text, accesses):
            self.check(whole, text)
            self.salts[shard.id] = self.salts[whole.id]
            layout = self.layouts[words[1][0]]
            self.driver.memories.reduce_scatter(self.view(whole), shard, layout, whole)
        self.salts[whole.id] = 0
        self._consumed.add(whole.name)
        self._consumed.discard(shard.name)

    def close(self) -> None:
        """End all threads, whatever has failed."""
        failed = self.lane.failed
        if failed:
            with suppress(OffloadError):
                self.driver.quiesce()
        else:
            self.driver.quiesce()
        self.lane.close()
        with suppress(OffloadError):
            super().close()


def on_ranks(
    n_ranks: int, body: Callable[[RankRig], object], n_frames: int, meeting: Meeting | None = None, **sizes: int
) -> list[object]:
    """Run a body on a rig of every rank; returns what each returned, or raised."""
    met = meeting or Meeting(n_ranks)

    def run(rank: int) -> object:
        rig = RankRig(met, rank, n_frames, **sizes)
        try:
            found = body(rig)
        except BaseException:
            rig.lane.close()  # as an engine that is left by an error does
            with suppress(BaseException):
                rig.close()
            raise
        rig.close()
        return found

    return on_all_ranks(met, run)


def right(found: list[object]) -> list[object]:
    """What all ranks returned, none of which raised."""
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found
