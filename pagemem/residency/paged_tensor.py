"""What is known of one paged tensor: where its bytes are whole, and who forbids moving them.

    ABSENT  --load-->  CLEAN                       nothing was ever written: reads as zeros
    STORED  --load-->  LOADING --> CLEAN           page file -> host; on failure back to STORED
    CLEAN   --touch--> DIRTY                       compute changed the host copy
    DIRTY   --store--> STORING --> CLEAN           host -> page file; back to DIRTY on failure or when changed meanwhile
    DIRTY   --fill--> ARRIVING --> DIRTY           a device copies its own bytes into the host frames
    CLEAN   --drop-->  STORED | ABSENT             host frames given up
    ABSENT  --resume--> STORED                     an earlier run's commit has the content
    ABSENT  --originate--> STORED                  files of others have the content, until it is changed
    any resident --discard--> ABSENT               the content is dead (a consumed gradient)

Invariants
    1. In STORED and LOADING the page file, or the origin, is authoritative; in CLEAN both copies are equal; in DIRTY
       and STORING the host copy is authoritative. In ARRIVING the device has the bytes, which whoever had them copied
       keeps until they are here. There is no state in which no copy is whole.
    2. A resident tensor, or one with pins or leases, keeps its frames: only other CLEAN tensors can be dropped.
    3. A tensor with an origin has no copy in the page files; once changed, it has none any more.
    4. Only `PagedTensor.become` changes the state, only along `RESIDENCY`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.disk_versions import DiskVersion
from pagemem.sources.source_files import Origin
from pagemem.state_machine import StateMachine
from pagemem.tier import Tag
from pagemem.units import BLOCK_BYTES, ceil_div, round_up


class Residency(enum.Enum):
    """Where a paged tensor's bytes are whole; see the diagram at the top of this module."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    ABSENT = "absent"
    STORED = "stored"
    LOADING = "loading"
    CLEAN = "clean"
    DIRTY = "dirty"
    STORING = "storing"
    ARRIVING = "arriving"


_R = Residency
RESIDENCY: Final = StateMachine(
    "",
    {
        _R.ABSENT: {_R.CLEAN, _R.STORED},
        _R.STORED: {_R.LOADING, _R.CLEAN, _R.ABSENT},
        _R.LOADING: {_R.CLEAN, _R.STORED},
        _R.CLEAN: {_R.DIRTY, _R.STORED, _R.ABSENT},
        _R.DIRTY: {_R.STORING, _R.ARRIVING, _R.ABSENT},
        _R.STORING: {_R.CLEAN, _R.DIRTY},
        _R.ARRIVING: {_R.DIRTY},
    },
)

#: States in which compute may read the host frames.
READABLE: Final = frozenset({_R.CLEAN, _R.DIRTY, _R.STORING})
#: Reached by a change of the content, which its origin does not have.
ENDS_ORIGIN: Final = frozenset({_R.DIRTY, _R.ABSENT})
#: States that end by themselves: a copy is under way.
IN_FLIGHT: Final = frozenset({_R.LOADING, _R.STORING, _R.ARRIVING})


@dataclass(slots=True, eq=False)
class PagedTensor:
    """One tensor under the allocator's care. All fields are guarded by the mover's lock.

    Attributes:
        n_bytes: size, a multiple of the I/O block.
        frame: first host frame while one is held, else None.
        copy: its page-file frames, kept for re-use once taken; ``ssd_valid`` says whether they hold its content,
            or the origin does.
        origin: pieces of other programs' files that are its content; None: it has none, or was changed since.
        snapshot_pending: a snapshot that is being made has yet to get the content: store it before it is changed.
        dirtied_during_store: compute changed the host copy while it was being stored: the stored copy is stale.
        may_be_aliased: a view that can be written to without our notice was handed out; see `Mover.collect_leases`.
        written: tells whether somebody wrote through views that were handed out and may still be in use; None: it knows
            of none.
        arrived: of the load under way or the last one: [start, end) of the bytes that are there already, in the order
            in which they came; only where somebody asked for it, see `HostMover.on_part`.
        tentative: nobody hears of it if the load under way fails: whoever wants the tensor loads it again.
        to_store: it is to be stored as soon as what is arriving is there.
        resident: its host frames stay its own for good: it is never moved or dropped.
        kept_at: of one that all ranks have, or are about to have, where the plan has it: it leaves where the plan says
            so, never for what is fetched on demand. None: it may leave.
        pins: uses under way that need the host frames to stay.
        uploads: copies of the host frames to the device that are under way, perhaps of what a load has brought so far;
            until they end it neither moves nor changes.
        updates: changes that a worker makes beside compute and that are not over, begun or not: nobody else reads or
            changes it before, and a plan's stores of it are made after.
        leases: live views of the host frames that were handed out, see `pagemem.devices.arena.HostArena.lease`.
        last_use: sequence number of the last use, for least-recently-used ranking.
    """

    id: TensorId
    name: str
    tag: Tag
    n_bytes: int
    n_frames: int
    state: Residency = Residency.ABSENT
    frame: FrameId | None = None
    copy: DiskVersion | None = None
    origin: Origin | None = None
    ssd_valid: bool = False
    snapshot_pending: bool = False
    dirtied_during_store: bool = False
    may_be_aliased: bool = False
    written: Callable[[], bool] | None = None
    arrived: list[tuple[int, int]] = field(default_factory=list)
    tentative: bool = False
    to_store: bool = False
    resident: bool = False
    kept_at: FrameId | None = None
    pins: int = 0
    uploads: int = 0
    updates: int = 0
    leases: int = 0
    last_use: int = 0
    history: list[Residency] = field(default_factory=list)

    @classmethod
    def sized(cls, tensor: TensorId, name: str, tag: Tag, n_bytes: int, page_bytes: int) -> PagedTensor:
        """A record for ``n_bytes`` bytes, rounded up to whole I/O blocks."""
        padded_bytes = round_up(n_bytes, BLOCK_BYTES)
        return cls(tensor, name, tag, padded_bytes, ceil_div(padded_bytes, page_bytes))

    @property
    def whole(self) -> bool:
        """Whether the host frames have all of the content, perhaps before updates that are not over."""
        return self.state in READABLE

    @property
    def readable(self) -> bool:
        """Whether compute may read the host frames now."""
        return self.state in READABLE and not self.updates

    @property
    def moving(self) -> bool:
        """Whether a copy from or to the host frames is under way that moving or discarding it has to wait for."""
        return self.state in IN_FLIGHT or self.uploads > 0

    @property
    def busy(self) -> bool:
        """Whether a copy or an update is under way that discarding it has to wait for."""
        return self.moving or self.updates > 0

    @property
    def held(self) -> bool:
        """Whether the host frames must stay where they are."""
        return self.pins > 0 or self.leases > 0 or self.resident

    def refuse_held(self, what: str) -> None:
        """Raise AssertionError unless the host frames can be given up; ``what`` names why they should be."""
        if self.held or self.uploads:
            raise AssertionError(f"{self.name} is held ({self.pins} pins, {self.leases} leases), cannot {what} it")

    def note_writes(self) -> None:
        """Count it as aliased where somebody wrote through a view."""
        if self.written is not None and self.written():
            self.may_be_aliased = True

    def become(self, state: Residency) -> None:
        """Apply one legal move.

        Raises:
            TransitionError: the table has no such move; the state is unchanged and the message ends with the history.
        """
        here = self.state
        self.state = RESIDENCY.move(here, state, self.name, self.history)
        if state in ENDS_ORIGIN:
            self.origin = None
        self.history = [*self.history[-5:], here]
