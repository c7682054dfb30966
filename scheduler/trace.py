"""The ordered operations of one step, as the training thread performed them. Pure data; no device, thread or file.

An operation (`Op`) is whatever touches paged tensors between two points of the training thread: a layer's forward, the
backward of a layer, a gradient being added to its accumulator, the update of a slice of optimizer states. Each names
the tensors it accesses and how; that is all the planner needs to know about training.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pagemem.page import TensorId


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
    undefined until it is created again. RENEW does not touch it: what lies in the tier below changes, so that a copy in this
    one is out of date, and one made before must not be used after.
    """

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "read"
    MODIFY = "modify"
    CREATE = "create"
    CONSUME = "consume"
    RENEW = "renew"


#: Modes after which a tensor has content that is not in the page files.
CHANGES: Final = frozenset({AccessMode.MODIFY, AccessMode.CREATE})
#: Modes after which what is in this tier of a tensor is of no use.
ENDS: Final = frozenset({AccessMode.CONSUME, AccessMode.RENEW})


@dataclass(frozen=True, slots=True)
class Access:
    """One tensor used by one op."""

    tensor: TensorId
    mode: AccessMode


#: Identifies an op across steps: the same key at the same place of the next step means the step did not change.
OpKey = tuple[OpKind, Hashable]


@dataclass(slots=True)
class Op:
    """One operation of a trace.

    Attributes:
        duration_s: from its tensors being at hand to the next op's beginning; waits are not part of it.
        until: index of the last op during which a view that this op handed out was still alive (its own index when
            nothing outlived it). The tensors cannot move before.
    """

    key: OpKey
    name: str
    accesses: tuple[Access, ...]
    duration_s: float = 0.0
    until: int = 0

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
        """Seconds of all ops, without waits."""
        return sum(op.duration_s for op in self.ops)

    def tensors(self) -> list[TensorId]:
        """Every tensor accessed, in order of first use."""
        return list(dict.fromkeys(access.tensor for op in self.ops for access in op.accesses))


@dataclass(slots=True)
class TraceRecorder:
    """Collects the ops of the step under way. Training thread only."""

    ops: list[Op] = field(default_factory=list)
    _last_by_tensor: dict[TensorId, int] = field(default_factory=dict)

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> int:
        """Append an op; returns its index."""
        index = len(self.ops)
        self.ops.append(Op(key, name, tuple(accesses), until=index))
        for access in accesses:
            self._last_by_tensor[access.tensor] = index
        return index

    def add_duration(self, seconds: float) -> None:
        """Add compute time to the op under way."""
        if self.ops:
            self.ops[-1].duration_s += seconds

    def views_ended(self, tensor: TensorId) -> None:
        """The last living view of ``tensor`` is gone: it was needed up to the op under way."""
        index = self._last_by_tensor.get(tensor)
        if index is not None:
            self.ops[index].until = len(self.ops) - 1

    def finish(self) -> Trace:
        """The finished step's trace; the recorder is empty again."""
        trace = Trace(tuple(self.ops))
        self.ops = []
        self._last_by_tensor = {}
        return trace
