"""Which tensor gets which frames of one tier. Pure integer arithmetic: no device, thread or file.

A tensor takes whole pages, in one run where there is one. What is left over, less than a page, takes a page of its own
in a *contiguous* placement, which compute sees as one flat view; in any other it may share a page with the left-over of
one other tensor. Nothing is copied here: `move` and `merge` change who owns what and return the copies that the caller
must make, in order, before it uses the frames for anything else.

Invariants, beside those of `pagemem.frames.book`
    1. A call that returns `Shortage` or raises has changed nothing.
    2. In a list of copies, made in order, none writes where bytes lie that have not been copied away.

Two tenants a page: Angel-PTM (VLDB 2023), page abstraction. Best fit with joined neighbours: Knuth, TAOCP 1, 2.5.
Who holds what is written in `pagemem.frames.book`; how tensors make room for each other is `pagemem.frames.relocation`;
how many bytes of a tier may be used at all, `pagemem.budget`.
"""

from __future__ import annotations

from collections.abc import Callable

from pagemem.frames.book import FrameBook
from pagemem.frames.packing import in_place_bytes
from pagemem.frames.page import FrameId, PageMove, Placement, Shortage, TensorId
from pagemem.frames.relocation import relocate, tenancy
from pagemem.units import BLOCK_BYTES, ceil_div, round_up


class PageAllocator(FrameBook):
    """Frames of one tier. Not thread safe: its owner's lock guards it. O(log n) a call unless it says otherwise."""

    def allocate(
        self, tensor: TensorId, n_bytes: int, *, contiguous: bool = False, at: FrameId | None = None
    ) -> Placement | Shortage:
        """Give ``tensor`` frames for ``n_bytes`` bytes.

        Args:
            contiguous: one run of whole frames, shared with nobody.
            at: first frame of exactly that run; implies ``contiguous``.

        Returns:
            The placement, or a shortage: too few frames are free, or (contiguous) too few side by side or at ``at``.

        Raises:
            ValueError: the size is not positive, or the tensor has frames in this tier already.
        """
        if n_bytes <= 0:
            raise ValueError(f"tensor {tensor}: n_bytes is {n_bytes}; it must be positive")
        if tensor in self._placements:
            raise ValueError(f"tensor {tensor} has frames in the {self.tier.value} tier already; release it first")
        if not contiguous and at is None:
            return self._allocate_packed(tensor, n_bytes)
        wanted = ceil_div(n_bytes, self.page_bytes)
        start = self.free.best_fit(wanted) if at is None else at
        if start is None or not self.free.holds(start, wanted):
            return self._shortage(wanted)
        return self.put(self.flat(tensor, n_bytes, start))

    def _allocate_packed(self, tensor: TensorId, n_bytes: int) -> Placement | Shortage:
        n_whole, tail_bytes = divmod(n_bytes, self.page_bytes)
        if round_up(tail_bytes, BLOCK_BYTES) == self.page_bytes:
            n_whole, tail_bytes = n_whole + 1, 0
        shared = self.shared.find_room(tail_bytes) if tail_bytes else None
        wanted = n_whole + (tail_bytes > 0 and shared is None)
        runs = self.free.fewest_pieces(n_whole)
        if runs is None or wanted > self.free_frames:
            return self._shortage(wanted)
        placed = self.put(Placement(tensor, self.tier, n_bytes, runs))
        tail = self.room_for_tail(tail_bytes) if tail_bytes else None
        return placed if tail is None else self.put_tail(tensor, tail)

    def move(self, tensor: TensorId, to: FrameId) -> list[PageMove] | Shortage:
        """Give a tensor the run of frames from ``to`` on, free or its own, instead of what it has.

        Returns:
            The copies to make, in order; a shortage when one of the frames is another's or does not exist.

        Raises:
            KeyError: the tensor has no frames here.
        """
        target = self.flat(tensor, self.held(tensor).n_bytes, to)
        moves = relocate(self, target, ())
        return self._shortage(target.n_frames) if moves is None else moves

    def merge(self, tensor: TensorId, *, movable: Callable[[TensorId], bool]) -> list[PageMove] | Shortage:
        """Make a tensor contiguous: in a free run if there is one, else where the fewest bytes have to be copied.

        In the latter case it gets a window of frames whose tenants move elsewhere, contiguous ones staying contiguous,
        scattered ones by their pages in the window alone. O(runs of the tier) then.

        Args:
            movable: whether another tensor may be moved; asked once for each.

        Returns:
            The copies to make, in order; none when the tensor is contiguous already. A shortage when no window can be
            cleared, or none of the `packing.MAX_WINDOWS` cheapest.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self.held(tensor)
        if placed.contiguous:
            return []
        wanted = ceil_div(placed.n_bytes, self.page_bytes)
        start = self.free.best_fit(wanted)
        if start is not None:
            return self.move(tensor, FrameId(start))
        # Pages are never saved by moving whole ones, only by tails that end up sharing: mostly this ends it early.
        if wanted <= self.free_frames + placed.n_frames + self.shared.n_with_room:
            in_place = in_place_bytes(placed.extents(self.page_bytes))
            for first, tenants in tenancy(self, tensor, movable).windows(wanted, self.n_frames, in_place):
                moves = relocate(self, self.flat(tensor, placed.n_bytes, first), tenants)
                if moves is not None:
                    return moves
        return self._shortage(wanted)

    def _shortage(self, wanted: int) -> Shortage:
        return Shortage(self.tier, wanted, self.free_frames, self.largest_free_run)
