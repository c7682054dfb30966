"""The frames of all tiers while a plan is replayed: who is where, with which content, and what still works on it.

Knows nothing of how plans are made. Content is a version: of a tensor and all that is made of it there is one newest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.sources import chain_of
from scheduler.planning.trace import CHANGES, Access, AccessMode, Op
from scheduler.planning.work import Work

_NEVER: Final = 1 << 62


class PlanError(AssertionError):
    """The plan asks for something impossible, or leaves an op without its tensors. A defect, never a caller's
    mistake."""


class ReplayedFrames:
    """Frames and contents. Runs of tasks are known by numbers; which of them are over is what the replay says.

    Args:
        work: the step and its tensors. n_frames: of each tier.

    Attributes:
        where: first frame of what is in frames.
        here: version in frames, None when they hold anything at all.
        made, reads, out: runs that make a tensor's content, that read it or are behind its changes, and that copy it
            out of the paged memory.
        locked_until: last op during which a view of the tensor lives.
        dead: what is of no use any more and leaves by itself.
        touched: frames that were used.
        known: ops before this one are over; so are these runs, and those that are over by it.
    """

    def __init__(self, work: Work, n_frames: Mapping[Tier, int]) -> None:
        self._work = work
        self._frames: dict[Tier, list[TensorId | None]] = {tier: [None] * n for tier, n in n_frames.items()}
        self._busy: dict[tuple[Tier, int], set[int]] = {}  # runs that work on frames that were given up
        self._root = {tensor: list(chain_of(tensor, work.sources))[-1] for tensor in work.tiers}
        self._copies: dict[TensorId, list[TensorId]] = defaultdict(list)
        for copy, source in work.sources.items():
            self._copies[source.tensor].append(copy)
        self._latest: dict[TensorId, int] = defaultdict(int)
        self._filed: dict[TensorId, int] = defaultdict(int)
        self._versions = 0
        self.where: dict[TensorId, int] = {}
        self.here: dict[TensorId, int | None] = {}
        self.made: dict[TensorId, set[int]] = defaultdict(set)
        self.reads: dict[TensorId, set[int]] = defaultdict(set)
        self.out: dict[TensorId, set[int]] = defaultdict(set)
        self._stored: dict[TensorId, set[int]] = defaultdict(set)
        self.locked_until: dict[TensorId, int] = defaultdict(lambda: -1)
        self.dead: set[TensorId] = set()
        self.touched: dict[Tier, set[int]] = {tier: set() for tier in n_frames}
        self.known: tuple[int, frozenset[int], Mapping[int, int]] = (0, frozenset(), {})

    # ---- frames ------------------------------------------------------------------------------------------------

    def tier(self, tensor: TensorId) -> Tier:
        """Of a tensor, or of a room."""
        if tensor >= 0:
            return self._work.tiers[tensor]
        conditional = self._work.trace.ops[-1 - tensor].conditional
        if conditional is None:
            raise PlanError(f"op {-1 - tensor} has a room and uses nothing by condition")
        return conditional.tier

    def size(self, tensor: TensorId) -> int:
        """Frames of a tensor, or of a room."""
        if tensor >= 0:
            return -(-self._work.n_bytes[tensor] // self._work.page_bytes)
        conditional = self._work.trace.ops[-1 - tensor].conditional
        return 0 if conditional is None else self._work.room_frames(conditional)

    def window(self, tensor: TensorId, frame: int, now: int) -> range:
        """The frames of a tensor that begins at ``frame``."""
        tier, size = self.tier(tensor), self.size(tensor)
        there, below = len(self._frames.get(tier, ())), self._work.below.get(tier, 0)
        if frame < below or frame + size > there:
            others = f", of which {below} are another's" if below else ""
            raise PlanError(f"op {now}: {tensor} has no frames {frame}..{frame + size - 1}: there are {there}{others}")
        return range(frame, frame + size)

    def place(self, tensor: TensorId, frame: int, now: int) -> None:
        """Give free frames to a tensor."""
        frames, window = self._frames[self.tier(tensor)], self.window(tensor, frame, now)
        for taken in frames[window.start : window.stop]:
            if taken is not None:
                raise PlanError(f"op {now}: {tensor} overlaps {taken}")
        frames[window.start : window.stop] = [tensor] * len(window)
        self.where[tensor] = frame
        self.touched[self.tier(tensor)].update(window)

    def tenants(self, tensor: TensorId, frame: int, now: int) -> set[TensorId]:
        """Who has the frames that a tensor is to have, or is that tensor."""
        window = self.window(tensor, frame, now)
        found = {t for t in self._frames[self.tier(tensor)][window.start : window.stop] if t is not None}
        return found | ({tensor} & self.where.keys())

    def copies(self, tensor: TensorId) -> list[TensorId]:
        """What is made of a tensor."""
        return self._copies.get(tensor, [])

    def leave(self, tensor: TensorId, now: int) -> None:
        """Make a tenant give its frames up; nothing may be lost by that, and nothing still work on it."""
        if self.locked_until[tensor] >= now:
            raise PlanError(f"op {now}: {tensor} leaves while a view of it lives")
        self._require_over(self.made[tensor] | self.reads[tensor], f"{tensor} leaves while a task uses it", now)
        if self.is_dirty(tensor) and tensor not in self.dead:
            raise PlanError(f"op {now}: {tensor} leaves dirty: it was not stored after its last change")
        self._free(tensor, now)

    def _free(self, tensor: TensorId, now: int) -> None:
        window, tier = self.window(tensor, self.where.pop(tensor), now), self.tier(tensor)
        runs = self.made[tensor] | self.reads[tensor]
        if runs:
            self._busy.update(((tier, frame), runs) for frame in window)
        self._frames[self.tier(tensor)][window.start : window.stop] = [None] * len(window)
        self.dead.discard(tensor)
        self.made[tensor], self.reads[tensor] = set(), set()

    def busy(self, tensor: TensorId, frame: int, now: int) -> set[int]:
        """The runs that work on free frames that a tensor is to have, as they did for who left them."""
        window = self.window(tensor, frame, now)
        return set().union(*(self._busy.get((self.tier(tensor), place), set()) for place in window))

    def free_dead(self, now: int) -> None:
        """What is dead, and of which no view lives any more, gives its frames up."""
        for tensor in [t for t in self.dead if self.locked_until[t] < now]:
            if tensor not in self.where:
                self.dead.remove(tensor)
                continue
            self._free(tensor, now)

    def is_over(self, run: int) -> bool:
        """Whether a run is certainly over for what is looked at now."""
        level, before, over = self.known
        return run in before or over.get(run, _NEVER) <= level

    def _require_over(self, runs: Iterable[int], otherwise: str, now: int) -> None:
        if not all(self.is_over(run) for run in runs):
            raise PlanError(f"op {now}: {otherwise}")

    # ---- contents ----------------------------------------------------------------------------------------------

    def is_dirty(self, tensor: TensorId) -> bool:
        """Whether a tensor has content that lies nowhere below it."""
        version = self.here.get(tensor) if tensor in self.where else None
        if version is None or tensor < 0 or version != self._latest[self._root[tensor]]:
            return False
        below = list(chain_of(tensor, self._work.sources))[1:]
        in_frames = any(other in self.where and self.here.get(other) == version for other in below)
        return not in_frames and self._filed[self._root[tensor]] != version

    def bring(self, tensor: TensorId, frame: int, run: int, now: int, *, fresh: bool) -> bool:
        """Bring a tensor in, in place of whatever is in its window; False where it is there already: it still counts as
        there only once the run is over."""
        root = self._root.get(tensor, tensor)
        newest = not fresh and self.here.get(tensor) == self._latest[root]
        if self.where.get(tensor) == frame and (newest or (fresh and tensor not in self.dead)):
            self.made[tensor].add(run)
            return False
        for tenant in self.tenants(tensor, frame, now):
            self.leave(tenant, now)
        for busy in self.window(tensor, frame, now):
            runs = self._busy.pop((self.tier(tensor), busy), set())
            self._require_over(runs, f"{tensor} comes while a task uses frame {busy}", now)
        source = self._work.sources.get(tensor)
        version: int | None = None
        if not fresh and source is not None:
            self.read(source.tensor, run, now)
            version = self.here[source.tensor]
        elif not fresh:
            self._require_over(self._stored[root], f"{tensor} is read before it is stored", now)
            version = self._filed[root]
        self.place(tensor, frame, now)
        self.here[tensor] = version
        self.made[tensor], self.reads[tensor] = {run}, set()
        return True

    def read(self, tensor: TensorId, run: int, now: int) -> None:
        """A task reads a tensor: it has to be there, and newest."""
        if tensor not in self.where:
            raise PlanError(f"op {now}: {tensor} is to be copied and is not there")
        if self.here[tensor] != self._latest[self._root[tensor]]:
            raise PlanError(f"op {now}: an old {tensor} is copied")
        self._require_over(self.made[tensor], f"{tensor} is copied before it is there", now)
        self.reads[tensor].add(run)

    def store(self, tensor: TensorId, run: int, now: int) -> bool:
        """Copy a tensor to the page files if it has changed."""
        if not self.is_dirty(tensor):
            return False
        self._require_over(self.made[tensor], f"{tensor} is stored before it is there", now)
        self.reads[tensor].add(run)
        self._stored[self._root[tensor]] = {run}
        self._filed[self._root[tensor]] = self._latest[self._root[tensor]]
        return True

    def arrive(self, tensor: TensorId, frame: int, run: int, now: int) -> None:
        """Bytes that the last op has made come to a tensor."""
        if self.where.get(tensor) != frame:
            raise PlanError(f"op {now}: {tensor} is to come to frame {frame} and has not got it")
        self.made[tensor] = {run}

    def write_back(self, tensor: TensorId, frame: int, run: int, now: int) -> bool:
        """A changed copy comes down to what it was made of; False where none has changed."""
        latest = self._latest[self._root[tensor]]
        if self.where.get(tensor) == frame and self.here.get(tensor) == latest:
            return False
        changed = [copy for copy in self._copies[tensor] if copy in self.where and self.here.get(copy) == latest]
        if not changed:
            return False
        if self.where.get(tensor) != frame:
            raise PlanError(f"op {now}: {tensor} is to come to frame {frame} and has not got it")
        self.read(changed[0], run, now)
        self._require_over(self.made[tensor] | self.reads[tensor], f"{tensor} is written while a task uses it", now)
        self.here[tensor] = latest
        self.made[tensor], self.reads[tensor] = {run}, set()
        self.dead.discard(tensor)
        return True

    # ---- ops ---------------------------------------------------------------------------------------------------

    def problem(self, access: Access) -> str | None:
        """What an op finds wrong with a tensor."""
        if access.mode is AccessMode.DISCARD:
            return None
        tensor = access.tensor
        if tensor not in self.where:
            return f"misses {tensor}"
        first, size = self.where[tensor], self.size(tensor)
        if self._frames[self.tier(tensor)][first : first + size].count(tensor) != size:
            return f"finds {tensor} overlapped"
        if access.mode is not AccessMode.CREATE and self.here[tensor] != self._latest[self._root[tensor]]:
            return f"sees an old {tensor}"
        return None

    def waits(self, access: Access) -> set[int]:
        """The runs that an op waits for before it uses a tensor so."""
        found = set(self.made[access.tensor])
        if access.mode in CHANGES:
            found |= self.reads[access.tensor]
        elif access.via is not None:
            found |= self.out[access.tensor]
        return found

    def follow(self, tensor: TensorId, now: int, *, reads: bool) -> None:
        """A task that uses a tensor as an op would has to come after what makes it, and after what reads it."""
        runs = self.made[tensor] | (self.reads[tensor] if reads else set())
        self._require_over(runs, f"{tensor} is updated while a task uses it", now)

    def change(self, access: Access, by: set[int], now: int) -> None:
        """What becomes of a tensor's content in an op, or ``by`` the run that performs it."""
        tensor = access.tensor
        root = self._root[tensor]
        if access.mode is AccessMode.DISCARD:
            self._versions += 1
            self._latest[root] = self._filed[root] = self._versions
            for other in list(chain_of(tensor, self._work.sources))[1:]:
                self.here[other] = self._versions if other in self.where else None
            if tensor in self.where:
                self.locked_until[tensor] = max(self.locked_until[tensor], now)
                self.dead.add(tensor)
            return
        if access.mode in CHANGES:
            self._versions += 1
            self._latest[root] = self.here[tensor] = self._versions
            self.made[tensor], self.reads[tensor] = set(by), set()
            self.dead.discard(tensor)
            return
        self.reads[tensor] |= by
        if access.mode is AccessMode.CONSUME:
            self._versions += 1
            self._latest[root] = self._filed[root] = self._versions  # Nothing is stored: who loads it now reads zeros.
            self.dead.update(link for link in chain_of(tensor, self._work.sources) if link in self.where)

    def lock(self, tensor: TensorId, until: int) -> None:
        """A view of a tensor lives until an op."""
        self.locked_until[tensor] = max(self.locked_until[tensor], until)

    def sent(self, tensors: set[TensorId], runs: set[int]) -> None:
        """What an op has consumed is being sent by runs."""
        for tensor in tensors:
            self.reads[tensor] |= runs

    def room(self, op: int, tier: Tier, n_frames: int) -> set[int] | None:
        """The runs after which the room of a conditional op is empty; None where it has none."""
        room = TensorId(-1 - op)
        if not n_frames:
            return set()
        first = self.where.get(room)
        if first is None or self._frames[tier][first : first + n_frames].count(room) != n_frames:
            return None
        return set(self.made[room])

    def is_for(self, tensor: TensorId, op: Op) -> bool:
        """Whether an op wants a tensor, or what is made of it, or what has to come down through it."""
        if tensor < 0:
            return op.conditional is not None
        wanted = {self._root[access.tensor] for access in op.accesses}
        return self._root.get(tensor) in wanted or bool(self._copies[tensor])
