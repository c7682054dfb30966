"""Tensors that are gathered from the shards of all ranks, in the arena where the own shard is.

A gathered tensor is a copy, as one of a device is: it is dropped when its frames are wanted, and gathered again. Where
its shard changes it is out of date. What is special is that no rank can gather alone. So whoever decides that one is
gathered must do so on all ranks (`scheduler.tiers.gathering` says how), and takes a *ticket*, a place in the order of
collectives (`pagemem.ranks.comm_lane`), at once; frames come later:

    ticket --its frames are there, or it is there already--> votes once the shard is readable
    ticket --refused: its place is in use, its shard does not come, or it is out of date--> nobody gathers it

A refused one is over on all ranks, and its op gathers it, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pagemem.files.transfer import Completion
from pagemem.frames.page import FrameId, TensorId
from pagemem.ranks.collectives import ShardLayout
from pagemem.ranks.comm_lane import CommLane
from pagemem.residency.gather_ticket import NOWHERE, ArenaOwner, GatherTicket
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag


class GatheredTensors:
    """Of one mover. With its lock held, but where a method says otherwise.

    Attributes:
        mover: owner of residency of these tensors and their shards.
        lane: makes the collectives; None: there are no other ranks, and no such tensors.
        outdated: tensors in frames that somebody held while their shard changed; they are filled anew when next used.
        places: where plans have tensors that ops gather now.
        is_queued: whether a load of a tensor waits in a lane, of those numbered before another task.
        comes_up: whether a shard that is being loaded waits for nothing but such tasks.
        n_tickets: taken so far.
        using: the ticket of the next load that is begun; None: it takes one.
    """

    def __init__(self, mover: ArenaOwner) -> None:
        self.mover = mover
        self.lane: CommLane | None = None
        self.outdated: set[TensorId] = set()
        self.places: dict[TensorId, FrameId | None] = {}
        self.is_queued: Callable[[TensorId, int], bool] = lambda tensor, before: False
        self.comes_up: Callable[[PagedTensor, int], bool] = lambda shard, before: True
        self.n_tickets = 0
        self.using: GatherTicket | None = None
        self._sources: dict[TensorId, tuple[PagedTensor, ShardLayout]] = {}
        self._written: PagedTensor | None = None
        self._made_of: dict[TensorId, list[PagedTensor]] = {}
        self._open: dict[TensorId, list[GatherTicket]] = {}
        mover.monitor.on_change(self.look)

    def __contains__(self, tensor: TensorId) -> bool:
        return tensor in self._sources

    def __bool__(self) -> bool:
        return bool(self._sources)

    def add(self, shard: PagedTensor, name: str, tag: Tag, layout: ShardLayout) -> PagedTensor:
        """A tensor that is gathered from a shard of this arena and those of the other ranks. Any thread; in the same
        order on all ranks.

        Raises:
            ValueError: the shard's tensor does not have the size that it has on all ranks.
        """
        with self.mover.changed:
            wanted = PagedTensor.sized(shard.id, name, tag, layout.shard_bytes, self.mover.arena.page_bytes)
            if shard.n_bytes != wanted.n_bytes:
                raise ValueError(f"{shard.name} has {shard.n_bytes} bytes; make it {wanted.n_bytes}, as on all ranks")
            tensor = self.mover.create(name, tag, layout.n_bytes)
            tensor.become(Residency.STORED)
            tensor.ssd_valid = True  # what is below is there: the shards
            self._sources[tensor.id] = shard, layout
            self._made_of.setdefault(shard.id, []).append(tensor)
            return tensor

    def shard(self, tensor: PagedTensor) -> PagedTensor:
        """What a tensor is gathered from here."""
        return self._sources[tensor.id][0]

    def layout(self, tensor: PagedTensor) -> ShardLayout:
        """How a tensor is cut into shards."""
        return self._sources[tensor.id][1]

    def forget(self, tensor: PagedTensor) -> None:
        """A tensor is forgotten: it, or its shard, no longer has to do with gathers."""
        if tensor.id in self._sources:
            self._made_of[self._sources.pop(tensor.id)[0].id].remove(tensor)
            self.outdated.discard(tensor.id)

    # ---- what is there -----------------------------------------------------------------------------------------

    def is_whole(self, tensor: PagedTensor) -> bool:
        """Whether a tensor may be read as it is."""
        return tensor.readable and tensor.id not in self.outdated

    def is_settled(self, tensor: PagedTensor) -> bool:
        """Whether no gather of a tensor is under way or to come."""
        return not self._open.get(tensor.id)

    def awaits(self, shard: PagedTensor) -> bool:
        """Whether a gather that has its frames has yet to read a shard."""
        wholes = self._made_of.get(shard.id, ())
        return any(ticket.reads_later for whole in wholes for ticket in self._open.get(whole.id, ()))

    def let_leave(self) -> None:
        """All tensors may leave for others again; the next use of each asks the other ranks. On all ranks."""
        for tensor in self.kept():
            tensor.kept_at = None

    def kept(self) -> list[PagedTensor]:
        """Those that only the plan makes leave."""
        tensors = self.mover.tensors
        return [tensors[number] for number in self._sources if tensors[number].kept_at is not None]

    def sources(self) -> Iterator[tuple[PagedTensor, PagedTensor, int]]:
        """Every tensor, its shard, and the bytes that all ranks move to gather it."""
        for number, (shard, layout) in self._sources.items():
            yield self.mover.tensors[number], shard, layout.n_bytes

    def changed(self, tensor: PagedTensor) -> None:
        """The content of a tensor changes: what is gathered from it is out of date.

        Raises:
            AssertionError: it is gathered itself.
        """
        if tensor.id in self._sources:
            raise AssertionError(f"{tensor.name} is gathered and cannot be changed; change {self.shard(tensor).name}")
        for whole in self._made_of.get(tensor.id, ()):
            self.outdate(whole)

    def note_write(self, tensor: PagedTensor) -> bool:
        """A tensor was written to; returns whether it is gathered, which `refuse_writes` tells of."""
        if tensor.id not in self._sources:
            return False
        self._written = self._written or tensor
        self.outdate(tensor)
        return True

    def refuse_writes(self) -> None:
        """Raise where gathered tensors were written to: they are gathered anew.

        Raises:
            RuntimeError: names one.
        """
        tensor, self._written = self._written, None
        if tensor is not None:
            raise RuntimeError(
                f"{tensor.name} was written to, of which each rank has a part: what was written is lost; write to the "
                "model before offload.prepare, or load weights by offload.load_weights or from a commit"
            )

    def discards(self, tensor: PagedTensor) -> bool:
        """A tensor is to be discarded: returns whether nothing is left to do for that, as it is gathered."""
        if tensor.id in self._sources:
            self.outdate(tensor)
            return True
        self.changed(tensor)
        return False

    def outdate(self, tensor: PagedTensor) -> None:
        """What there is of a tensor, or is on its way, is of no use."""
        for ticket in self._open.get(tensor.id, ()):
            ticket.refused = True
        tensor.kept_at = None
        if tensor.readable:
            self.outdated.add(tensor.id)
            if not tensor.held and not tensor.uploads:
                self.outdated.discard(tensor.id)
                self.mover.drop(tensor)
        self.look()

    # ---- tickets -----------------------------------------------------------------------------------------------

    def ticket(
        self,
        tensor: PagedTensor,
        *,
        planned: bool = False,
        load: Completion | None = None,
        fills: bool = False,
        has: bool = False,
        refused: bool = False,
    ) -> GatherTicket:
        """Have a tensor gathered next, after all that was asked for before. Training thread; on all ranks. For the
        arguments see `GatherTicket`."""
        assert self.lane is not None
        source = self.shard(tensor), self.layout(tensor), self.lane.collectives.shard_rank
        ticket = GatherTicket(self.mover, tensor, *source, planned=planned)
        ticket.comes_up, ticket.on_end = self.comes_up, self._ended
        ticket.load, ticket.fills, ticket.has, ticket.refused = load, fills, has, refused
        place = None if planned else self.places.pop(tensor.id, None)
        ticket.place = NOWHERE if place is None else place
        if has or (fills and load is None):
            ticket.hold(tensor)
        self.n_tickets += 1
        self._open.setdefault(tensor.id, []).append(ticket)
        self.lane.submit(ticket)
        return ticket

    def claim(self, ticket: GatherTicket) -> None:
        """The tensor of an undecided ticket is there already."""
        ticket.hold(ticket.tensor)
        ticket.has = True
        self.look()

    def refuse(self, ticket: GatherTicket) -> None:
        """A ticket that has no frames is not to get any."""
        if ticket.undecided:
            ticket.refused = True
            self.look()

    def fill(self, tensor: PagedTensor, load: Completion) -> None:
        """Begin to fill the frames that a tensor has just got, by the ticket that is in use, or the next one."""
        ticket, self.using = self.using, None
        load.begun = True
        if ticket is None:
            self.ticket(tensor, load=load, fills=True)
        else:
            ticket.load, ticket.fills = load, True
            self.look()

    def _ended(self, ticket: GatherTicket) -> None:
        self._open[ticket.tensor.id].remove(ticket)
        if ticket.fills and ticket.is_right:
            self.outdated.discard(ticket.tensor.id)

    def look(self) -> None:
        """Something changed that a vote may depend on."""
        if self.lane is not None:
            self.lane.look()
