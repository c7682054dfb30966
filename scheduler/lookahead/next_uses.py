"""When a tensor is used again in steps that repeat. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import TensorId
from scheduler.planning.trace import AccessMode, Trace

#: Further away than any op.
NEVER: Final = 1 << 40
_REPLACES: Final = frozenset({AccessMode.CREATE, AccessMode.DISCARD})


@dataclass(slots=True)
class NextUses:
    """The ops that use each tensor of a trace, as a cycle.

    Attributes:
        copied_at: of tensors that are copied up from where they are, the ops with which that begins in some step.
    """

    trace: Trace
    copied_at: Mapping[TensorId, Iterable[int]] = field(default_factory=dict)
    _uses: dict[TensorId, list[int]] = field(default_factory=dict)
    _modes: dict[tuple[TensorId, int], AccessMode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, op in enumerate(self.trace.ops):
            for access in op.accesses:
                uses = self._uses.setdefault(access.tensor, [])
                if not uses or uses[-1] != index:
                    uses.append(index)
                    self._modes[access.tensor, index] = access.mode
        for tensor, triggers in self.copied_at.items():
            for index in sorted({trigger % len(self.trace.ops) for trigger in triggers}):
                if (tensor, index) not in self._modes:
                    bisect.insort(self._uses.setdefault(tensor, []), index)
                    self._modes[tensor, index] = AccessMode.READ

    def next(self, tensor: TensorId, position: int) -> tuple[int, AccessMode] | None:
        """Ops from ``position`` (of any cycle) to the first one that uses a tensor, 0 for that op itself, and how it
        does; None: none does."""
        uses = self._uses.get(tensor)
        if not uses:
            return None
        n_ops = len(self.trace.ops)
        index = position % n_ops
        place = bisect.bisect_left(uses, index)
        use, wrapped = (uses[place], 0) if place < len(uses) else (uses[0], n_ops)
        return use + wrapped - index, self._modes[tensor, use]

    def distance(self, tensor: TensorId, position: int) -> int:
        """Ops from ``position`` to the first one that wants what a tensor holds then; `NEVER` where none does."""
        found = self.next(tensor, position)
        return NEVER if found is None or found[1] in _REPLACES else found[0]
