"""The ordered operations of one step, as the training thread performed them. Data; no device, thread or file.

An operation (`Op`) is whatever touches paged tensors between two points of the training thread: a layer's forward, the
backward of a layer, a gradient being added to its accumulator, the update of a slice of optimizer states. Each names
the tensors it accesses and how; that is all the planner needs to know about training.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any, Final, Protocol

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.task import Lane, TaskKind


class OpKind(enum.Enum):
    """What the training thread does in an op."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    FORWARD = "forward"
    BACKWARD = "backward"
    GRADIENT = "gradient"
    UPDATE = "update"


class AccessMode(enum.Enum):
    """How an op uses a tensor.

    CREATE writes it without looking at what it held; CONSUME reads it for the last time, its content is dead after, and
    undefined until it is created again. DISCARD does not touch it: its content is of no use from then on.
    """

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "read"
    MODIFY = "modify"
    CREATE = "create"
    CONSUME = "consume"
    DISCARD = "discard"


#: Modes after which a tensor has content that is not in the page files.
CHANGES: Final = frozenset({AccessMode.MODIFY, AccessMode.CREATE})
#: Modes after which the content of a tensor is of no use.
ENDS: Final = frozenset({AccessMode.CONSUME, AccessMode.DISCARD})


@dataclass(frozen=True, slots=True)
class Access:
    """One tensor used by one op.

    Attributes:
        tier: where it is used. A copy in another tier is another tensor.
        via: what moves the bytes where the op does not touch the tensor itself. CREATE via DOWNLOAD or REDUCE_SCATTER:
            they arrive after the op, from what it CONSUMEs or from memory that is not paged. READ or CONSUME via
            UPLOAD: they are copied up for the op, out of the paged memory. MODIFY via FILL: other ranks' parts arrive
            after the op.
    """

    tensor: TensorId
    mode: AccessMode
    tier: Tier = Tier.HOST
    via: TaskKind | None = None


@dataclass(frozen=True, slots=True)
class Conditional:
    """Tensors of which an op uses some, known just before it: experts, or rows of a table.

    Attributes:
        tensors: those that it may use, none of which is among its accesses.
        k: how many it uses as a rule; the plan keeps room for the ``k`` largest.
    """

    tensors: tuple[TensorId, ...]
    k: int
    tier: Tier = Tier.HOST


#: Identifies an op across steps: the same key at the same place of the next step means the step did not change.
OpKey = tuple[OpKind, Hashable]


@dataclass(slots=True)
class Op:
    """One operation of a trace.

    Attributes:
        duration_s: from when its tensors are usable to the next op's beginning; waits are not part of it.
        until: index of the last op during which a view that this op handed out was still alive (its own index when
            nothing outlived it). The tensors cannot move before.
        lane: COMPUTE, or UPDATE for an update that a worker makes beside compute: it begins when the op before it is
            over, its tensors are there and the update before it is made; later ops that use what it changes wait.
        conditional: tensors of which it uses some.
    """

    key: OpKey
    name: str
    accesses: tuple[Access, ...]
    duration_s: float = 0.0
    until: int = 0
    lane: Lane = Lane.COMPUTE
    conditional: Conditional | None = None

    @property
    def kind(self) -> OpKind:
        """What the training thread does in it."""
        return self.key[0]


@dataclass(frozen=True, slots=True)
class Trace:
    """The ops of one whole step, from one optimizer step to the next."""

    ops: tuple[Op, ...]

    @property
    def keys(self) -> tuple[OpKey, ...]:
        """What two steps must have in common for one plan to serve both."""
        return tuple(op.key for op in self.ops)

    @property
    def compute_s(self) -> float:
        """Seconds of all ops of compute, without waits."""
        return sum(op.duration_s for op in self.ops if op.lane is Lane.COMPUTE)

    def take_durations(self, earlier: Trace) -> None:
        """Have ops that were not timed last as long as they did in an earlier step, as far as the two begin alike."""
        for op, before in zip(self.ops, earlier.ops, strict=False):
            if op.key != before.key:
                return
            op.duration_s = op.duration_s or before.duration_s

    def joined(self, other: Trace) -> Trace:
        """A step with the ops of both: those that they have in common, in order, once. Ops last as long as here, or as
        there where they are not here."""
        mine: dict[int, int] = {}
        others: dict[int, int] = {}
        ops: list[Op] = []
        keys, other_keys = self.keys, other.keys
        for tag, start, end, other_start, other_end in SequenceMatcher(None, keys, other_keys, False).get_opcodes():
            if tag == "equal":
                others.update((other_start + index, len(ops) + index) for index in range(end - start))
            mine.update((start + index, len(ops) + index) for index in range(end - start))
            ops += self.ops[start:end]
            if tag != "equal":
                others.update((other_start + index, len(ops) + index) for index in range(other_end - other_start))
                ops += other.ops[other_start:other_end]
        until = list(range(len(ops)))
        for trace, places in ((self, mine), (other, others)):
            for index, place in places.items():
                until[place] = max(until[place], places[trace.ops[index].until])
        return Trace(tuple(replace(op, until=last) for op, last in zip(ops, until, strict=True)))

    def first_uses(self) -> dict[TensorId, int]:
        """Every tensor accessed, in order of first use, and the op of that."""
        found: dict[TensorId, int] = {}
        for index, op in enumerate(self.ops):
            for access in op.accesses:
                found.setdefault(access.tensor, index)
        return found

    def tensors(self) -> list[TensorId]:
        """Every tensor accessed, in order of first use."""
        return list(self.first_uses())


class Clock(Protocol):
    """Tells how long what computes takes: the training thread itself, or a device that works through what it was
    given."""

    def stamp(self) -> Any:
        """A moment: now, or when a device comes to this place in what it was given. Does not wait for that."""

    def seconds(self, begun: Any, ended: Any) -> float:
        """From one of its stamps to a later one. Waits until a device has come to that."""


@dataclass(frozen=True, slots=True)
class HostClock:
    """The training thread's own clock; see `Clock`. ``stamp`` tells now."""

    stamp: Callable[[], float] = time.perf_counter

    def seconds(self, begun: float, ended: float) -> float:
        """The difference."""
        return ended - begun


@dataclass(slots=True)
class TraceRecorder:
    """Collects the ops of the step under way, and when each one computed. Training thread only.

    Attributes:
        clocks: that time the ops of each tier.
    """

    clocks: dict[Tier, Clock] = field(default_factory=lambda: {Tier.HOST: HostClock()})
    ops: list[Op] = field(default_factory=list)
    _last_by_tensor: dict[TensorId, int] = field(default_factory=dict)
    _began: Any = None
    _clock: Clock = field(default_factory=HostClock)
    _spans: list[tuple[Op, Clock, Any, Any]] = field(default_factory=list)
    _assumed: set[int] = field(default_factory=set)

    @property
    def performed(self) -> list[OpKey]:
        """The ops that were performed, without those assumed."""
        return [op.key for index, op in enumerate(self.ops) if index not in self._assumed]

    def assume(self, op: Op) -> None:
        """Append an op that is not performed, but may be in later steps of the same kind."""
        self._assumed.add(self.begin(op.key, op.name, op.accesses, op.lane))

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access], lane: Lane = Lane.COMPUTE) -> int:
        """Append an op; returns its index."""
        index = len(self.ops)
        self.ops.append(Op(key, name, tuple(accesses), until=index, lane=lane))
        self._clock = self.clocks[accesses[0].tier if accesses else Tier.HOST]
        for access in accesses:
            self._last_by_tensor[access.tensor] = index
        return index

    @property
    def computing(self) -> bool:
        """Whether the time from now on is the last op's."""
        return self._began is not None

    def go_on(self) -> None:
        """Compute has what it needs: from here on the time is the last op's."""
        self._began = self._clock.stamp()

    def pause(self) -> None:
        """What comes next is not the last op's compute: a wait, something outside the step, or its end."""
        if self._began is not None and self.ops:
            self._spans.append((self.ops[-1], self._clock, self._began, self._clock.stamp()))
        self._began = None

    def views_ended(self, tensor: TensorId) -> None:
        """The last living view of ``tensor`` is gone: it was needed up to the op under way."""
        index = self._last_by_tensor.get(tensor)
        if index is not None:
            self.ops[index].until = len(self.ops) - 1

    def finish(self, *, timed: bool = True, assumed: bool = True) -> Trace:
        """The finished step's trace; the recorder is empty again.

        Args:
            timed: whether anybody wants the ops' durations, for which a device is waited for; else they are 0.
            assumed: whether the trace is to have what was assumed, too.
        """
        self.resolve_times(timed=timed, assumed=assumed)
        trace = Trace(tuple(self.ops))
        self.ops, self._spans, self._began, self._assumed = [], [], None, set()
        self._last_by_tensor = {}
        return trace

    def resolve_times(self, *, timed: bool, assumed: bool) -> None:
        """Have the ops be those of `finish`, with their durations, which adds nothing to them then."""
        self.pause()
        if timed:
            for op, clock, begun, ended in self._spans:
                op.duration_s += clock.seconds(begun, ended)
        self._spans = []
        if not assumed and self._assumed:
            self._leave_assumed_out()
            self._assumed = set()

    def _leave_assumed_out(self) -> None:
        kept_until: list[int] = []  # ops kept up to each one
        for index in range(len(self.ops)):
            kept_until.append((kept_until[-1] if kept_until else -1) + (index not in self._assumed))
        for op in self.ops:
            op.until = kept_until[op.until]
        self.ops = [op for index, op in enumerate(self.ops) if index not in self._assumed]
