"""The allocator against a model that knows the owner of every block of every frame.

The model holds the tier's memory as a bytearray, scaled down: one byte stands for a block of 4096. Each tensor's bytes
are written when it is placed and read back, through its placement, after every rule.
"""

from __future__ import annotations

import random

from cross_references import check_frames
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import Extent, FrameId, Placement, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, KiB, ceil_div

PAGE = 64 * KiB
BLOCKS = PAGE // BLOCK_BYTES
whole_pages = st.integers(1, 4).map(lambda n: n * PAGE)
sizes = st.one_of(st.integers(1, 4 * PAGE), st.integers(1, PAGE), whole_pages, whole_pages.map(lambda n: n - 1))
sizes_of_small = st.one_of(st.just(PAGE), st.integers(1, PAGE), st.just(2 * PAGE))


def blocks(extent: Extent) -> slice:
    """The blocks of the tier's memory that an extent touches."""
    begin = extent.frame * BLOCKS + extent.offset_bytes // BLOCK_BYTES
    return slice(begin, begin + ceil_div(extent.length_bytes, BLOCK_BYTES))


class AllocatorAgainstByteMap(RuleBasedStateMachine):
    tensors = Bundle("tensors")

    @initialize(target=tensors, n_frames=st.integers(1, 16), pages=st.lists(sizes_of_small, max_size=16))
    def start(self, n_frames: int, pages: list[int]) -> object:
        """A tier that begins with some small tensors, so that what is freed is scattered."""
        self.frames = PageAllocator(Tier.HOST, PAGE, n_frames)
        self.n_frames = n_frames
        self.memory = bytearray(n_frames * BLOCKS)
        self.owner: list[TensorId | None] = [None] * len(self.memory)
        self.content: dict[TensorId, bytes] = {}
        self.sizes: dict[TensorId, int] = {}
        self.next_id = 0
        self.peak = 0
        placed = [self.frames.allocate(self.new_id(), n_bytes) for n_bytes in pages]
        return multiple(*(self.settle(found) for found in placed if isinstance(found, Placement)))

    # ---- rules -----------------------------------------------------------------------------------------------------

    @rule(target=tensors, n_bytes=sizes, contiguous=st.booleans())
    def allocate(self, n_bytes: int, contiguous: bool) -> object:
        found = self.frames.allocate(self.new_id(), n_bytes, contiguous=contiguous)
        wanted = ceil_div(n_bytes, PAGE)
        if isinstance(found, Shortage):
            self.check_shortage(found)
            enough = self.longest_free_run() if contiguous else self.n_free()
            assert enough < found.wanted_frames <= wanted
            return multiple()
        assert not contiguous or (len(found.runs) == 1 and found.tail is None)
        return self.settle(found)

    @rule(target=tensors, n_bytes=sizes, at=st.integers(0, 30))
    def allocate_at(self, n_bytes: int, at: int) -> object:
        wanted = range(at, at + ceil_div(n_bytes, PAGE))
        fits = all(frame < self.n_frames and self.is_free(frame) for frame in wanted)
        found = self.frames.allocate(self.new_id(), n_bytes, at=FrameId(at))
        if isinstance(found, Shortage):
            self.check_shortage(found)
            assert not fits
            return multiple()
        assert fits
        assert found.runs[0].first == at
        return self.settle(found)

    @precondition(lambda self: self.n_free())
    @rule(target=tensors, spared=st.integers(0, 2), left_over=st.integers(0, PAGE - 1))
    def fill(self, spared: int, left_over: int) -> object:
        """Take what is free, all but a frame or two: this is what gets scattered."""
        return self.allocate_packed(max(1, (self.n_free() - spared) * PAGE - left_over))

    def allocate_packed(self, n_bytes: int) -> object:
        found = self.frames.allocate(self.new_id(), n_bytes)
        return multiple() if isinstance(found, Shortage) else self.settle(found)

    @rule(tensor=consumes(tensors))
    def release(self, tensor: TensorId) -> None:
        for extent in self.frames.release(tensor).extents(PAGE):
            self.clear(extent, tensor)
        del self.content[tensor], self.sizes[tensor]

    @rule(n_frames=st.integers(0, 4))
    def grow(self, n_frames: int) -> None:
        self.frames.grow(n_frames)
        self.n_frames += n_frames
        self.memory += bytes(n_frames * BLOCKS)
        self.owner += [None] * (n_frames * BLOCKS)

    # ---- what must hold after each rule ------------------------------------------------------------------------------

    @invariant()
    def every_tensor_reads_back(self) -> None:
        for tensor, content in self.content.items():
            found = b"".join(bytes(self.memory[blocks(extent)]) for extent in self.placement(tensor).extents(PAGE))
            assert found == content, f"tensor {tensor} reads {found.hex()}, not {content.hex()}"

    @invariant()
    def the_numbers_are_those_of_the_model(self) -> None:
        frames = self.frames
        check_frames(frames)
        used = sum(not self.is_free(frame) for frame in range(self.n_frames))
        self.peak = max(self.peak, used)
        assert (frames.n_frames, frames.used_frames, frames.free_frames) == (self.n_frames, used, self.n_frames - used)
        assert frames.peak_frames == self.peak
        assert max((length for _, length in frames.free.by_start.items()), default=0) == self.longest_free_run()
        assert sorted(frames.placements) == sorted(self.sizes)

    @invariant()
    def frames_have_the_owners_of_the_model(self) -> None:
        shown: list[TensorId | None] = []
        last: object = object()
        for first, length, owner in self.frames.segments():
            assert (first, length > 0, owner != last) == (len(shown), True, True)
            shown += [owner] * length
            last = owner
        for begin, end in (
            (0, self.n_frames // 2),
            (self.n_frames // 3, None),
            (self.n_frames // 3, self.n_frames // 3 + 2),
        ):
            stretch = list(self.frames.segments(begin, end))
            assert [owner for _, length, owner in stretch for _ in range(length)] == shown[begin:end]
            assert [first for first, _, _ in stretch] == [
                begin + sum(length for _, length, _ in stretch[:i]) for i in range(len(stretch))
            ]
        for frame in range(self.n_frames):
            owners = self.owners(frame)
            assert len(owners) <= 2
            assert self.frames.owner(frame) == shown[frame]
            assert shown[frame] in owners if owners else shown[frame] is None

    # ---- the model ---------------------------------------------------------------------------------------------------

    def new_id(self) -> TensorId:
        self.next_id += 1
        return TensorId(self.next_id)

    def settle(self, placed: Placement) -> TensorId:
        """Note the owner of every block of a new tensor and write its bytes."""
        extents = placed.extents(PAGE)
        assert sum(extent.length_bytes for extent in extents) == placed.n_bytes
        assert all(extent.length_bytes == PAGE for extent in extents[:-1])
        for extent in extents:
            assert 0 <= extent.offset_bytes <= PAGE - extent.length_bytes
            assert extent.offset_bytes % BLOCK_BYTES == 0
            shared = extent == placed.tail
            assert not self.owners(extent.frame) or shared
            assert all(self.owner[block] is None for block in self.covered(extent))
            for block in self.covered(extent):
                self.owner[block] = placed.tensor
        content = random.Random(placed.tensor).randbytes(sum(len(range(*blocks(e).indices(10**6))) for e in extents))
        self.content[placed.tensor], self.sizes[placed.tensor] = content, placed.n_bytes
        at = 0
        for extent in extents:
            here = blocks(extent)
            self.memory[here] = content[at : at + here.stop - here.start]
            at += here.stop - here.start
        assert self.placement(placed.tensor) == placed
        return placed.tensor

    def clear(self, extent: Extent, tensor: TensorId) -> None:
        here = blocks(extent)
        self.memory[here] = b"\xee" * (here.stop - here.start)  # What is read after this is wrong and shows.
        for block in self.covered(extent):
            assert self.owner[block] == tensor
            self.owner[block] = None

    def covered(self, extent: Extent) -> range:
        here = blocks(extent)
        return range(here.start, here.stop)

    def owners(self, frame: int) -> set[TensorId]:
        return {owner for owner in self.owner[frame * BLOCKS : (frame + 1) * BLOCKS] if owner is not None}

    def is_free(self, frame: int) -> bool:
        return not self.owners(frame)

    def n_free(self) -> int:
        return sum(self.is_free(frame) for frame in range(self.n_frames))

    def longest_free_run(self) -> int:
        longest = run = 0
        for frame in range(self.n_frames):
            run = run + 1 if self.is_free(frame) else 0
            longest = max(longest, run)
        return longest

    def placement(self, tensor: TensorId) -> Placement:
        placed = self.frames.placements.get(tensor)
        assert placed is not None
        return placed

    def layout(self) -> dict[TensorId, Placement]:
        return {tensor: self.placement(tensor) for tensor in self.frames.placements}

    def check_shortage(self, found: Shortage) -> None:
        assert (found.tier, found.free_frames) == (Tier.HOST, self.n_free())


TestAllocatorAgainstByteMap = AllocatorAgainstByteMap.TestCase
TestAllocatorAgainstByteMap.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
