"""Copy on write against a model: whatever is stored, committed, given up and restored, a commit reads as it was made.

A "disk" is a dictionary of blocks. Tensors are stored again and again, as the mover does it: to their own frames unless
a commit names them. After every call each commit and each tensor must read as the model says, and no block may be
counted twice; at the end nothing is left in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cross_references import check_frames
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagemem.files.checksums import DigestArray
from pagemem.frames.page import Extent, Placement
from pagemem.residency.disk_versions import DiskVersion, DiskVersions
from pagemem.tier import Tag
from pagemem.units import BLOCK_BYTES, KiB

PAGE = 64 * KiB
SLAB_FRAMES = 4
SIZES = st.integers(1, 40).map(lambda blocks: blocks * BLOCK_BYTES)


class Disk:
    """Page files of which a block holds the number that was written to it."""

    def __init__(self) -> None:
        self.n_frames = 0
        self.blocks: dict[int, int] = {}
        self.sums_of: dict[Extent, int] = {}

    def grow(self, n_frames: int) -> None:
        self.n_frames = -(-n_frames // SLAB_FRAMES) * SLAB_FRAMES

    def route(self, extents: list[Extent]) -> tuple[Extent, ...]:
        assert all(0 <= extent.frame < self.n_frames for extent in extents)
        return tuple(extents)

    def sums(self, route: tuple[Extent, ...]) -> DigestArray:
        return np.array([self.sums_of[extent] for extent in route], dtype=np.uint64)

    def remember(self, route: tuple[Extent, ...], sums: DigestArray) -> None:
        self.sums_of.update(zip(route, sums.tolist(), strict=True))

    def write(self, stored: DiskVersion, value: int) -> None:
        for block in blocks_of(stored.placement):
            self.blocks[block] = value
        self.remember(stored.route, np.full(len(stored.route), value, dtype=np.uint64))  # type: ignore[arg-type]

    def read(self, stored: DiskVersion) -> set[int]:
        return {self.blocks[block] for block in blocks_of(stored.placement)}


def blocks_of(placed: Placement) -> list[int]:
    """Numbers of the blocks in which the bytes lie."""
    found: list[int] = []
    for extent in placed.extents(PAGE):
        first = (extent.frame * PAGE + extent.offset_bytes) // BLOCK_BYTES
        found += range(first, first - (-extent.length_bytes // BLOCK_BYTES))
    return found


@dataclass
class Tensor:
    """A tensor, and what its current copy must hold."""

    n_bytes: int
    copy: DiskVersion | None = None
    value: int = 0


@dataclass
class Commit:
    """Copies that a commit names, and what each must hold."""

    named: list[tuple[DiskVersion, int]] = field(default_factory=list)


class CopiesModel(RuleBasedStateMachine):
    """Calls on one `DiskVersions`, as mover and committer make them."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.copies = DiskVersions(self.disk, PAGE)  # type: ignore[arg-type]
        self.tensors: list[Tensor] = []
        self.commits: list[Commit] = []
        self.written = 0

    @initialize(sizes=st.lists(SIZES, min_size=1, max_size=5))
    def make(self, sizes: list[int]) -> None:
        self.tensors = [Tensor(size) for size in sizes]

    def pick(self, data: st.DataObject) -> Tensor:
        return self.tensors[data.draw(st.integers(0, len(self.tensors) - 1))]

    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        tensor = self.pick(data)
        if tensor.copy is None or tensor.copy.commits:
            fresh = self.copies.take(tensor.n_bytes, Tag.PARAM)
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
            tensor.copy = fresh
        self.written += 1
        tensor.value = self.written
        self.disk.write(tensor.copy, tensor.value)

    @rule()
    def commit(self) -> None:
        made = Commit([(tensor.copy, tensor.value) for tensor in self.tensors if tensor.copy is not None])
        for stored, _ in made.named:
            self.copies.hold(stored)
        self.commits.append(made)

    @precondition(lambda self: self.commits)
    @rule(data=st.data())
    def remove_commit(self, data: st.DataObject) -> None:
        for stored, _ in self.commits.pop(data.draw(st.integers(0, len(self.commits) - 1))).named:
            self.copies.let_go(stored)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        tensor = self.pick(data)
        if tensor.copy is not None:
            self.copies.leave(tensor.copy)
            tensor.copy = None

    @precondition(lambda self: self.commits)
    @rule(data=st.data())
    def go_on_from_a_commit(self, data: st.DataObject) -> None:
        """In the same process: tensors take the commit's copies over."""
        commit = self.commits[data.draw(st.integers(0, len(self.commits) - 1))]
        for tensor in self.tensors:
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
                tensor.copy = None
        for tensor, (stored, value) in zip(self.tensors, commit.named, strict=False):
            stored.current = True
            tensor.n_bytes, tensor.copy, tensor.value = stored.placement.n_bytes, stored, value

    @rule(n_frames=st.integers(0, 12))
    def reserve(self, n_frames: int) -> None:
        used = self.copies.book.used_frames
        self.copies.reserve(n_frames)
        assert self.copies.book.free_frames >= n_frames and self.copies.book.used_frames == used

    @rule()
    def restart(self) -> None:
        """The process was killed: the next one knows the commits alone, and what they say of their copies."""
        sums = {id(stored): self.disk.sums(stored.route) for commit in self.commits for stored, _ in commit.named}
        self.disk.n_frames, self.disk.sums_of = 0, {}
        self.copies = DiskVersions(self.disk, PAGE)  # type: ignore[arg-type]
        restored: dict[int, DiskVersion] = {}
        for commit in self.commits:
            for at, (stored, value) in enumerate(commit.named):
                if id(stored) not in restored:
                    restored[id(stored)] = self.copies.restore(stored.placement, sums[id(stored)], Tag.PARAM)
                commit.named[at] = restored[id(stored)], value
                self.copies.hold(restored[id(stored)])
        for tensor in self.tensors:
            tensor.copy = None

    @invariant()
    def everything_reads_as_it_was_written(self) -> None:
        for commit in self.commits:
            for stored, value in commit.named:
                assert self.disk.read(stored) == {value}, "a commit reads as something else"
                assert set(self.disk.sums(stored.route).tolist()) == {value}  # type: ignore[arg-type]
        for tensor in self.tensors:
            assert tensor.copy is None or self.disk.read(tensor.copy) == {tensor.value}

    @invariant()
    def every_copy_in_use_is_counted_once(self) -> None:
        check_frames(self.copies.book)
        named = [stored for commit in self.commits for stored, _ in commit.named]
        used = {id(stored): stored for stored in [*named, *(t.copy for t in self.tensors if t.copy is not None)]}
        assert len(self.copies.book.placements) == len(used)
        for stored in used.values():
            assert stored.commits == sum(one is stored for one in named)
            assert stored.current == any(tensor.copy is stored for tensor in self.tensors)
        blocks = [block for stored in used.values() for block in blocks_of(stored.placement)]
        assert len(blocks) == len(set(blocks))

    def teardown(self) -> None:
        for commit in self.commits:
            for stored, _ in commit.named:
                self.copies.let_go(stored)
        for tensor in self.tensors:
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
        assert self.copies.book.used_frames == 0


TestCopies = CopiesModel.TestCase
TestCopies.settings = settings(stateful_step_count=30)
