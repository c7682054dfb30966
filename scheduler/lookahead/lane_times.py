"""When a lane is free, on the predicted clock of the reader. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class LaneTimes:
    """One lane. What is planned ahead goes in order into the gaps that work at the time of its op leaves.

    Attributes:
        free_s: when the last piece of work that was planned ahead ends.
    """

    free_s: float = 0.0
    _fixed: list[tuple[float, float]] = field(default_factory=list)

    def start_s(self, from_s: float, takes_s: float) -> float:
        """When work can begin that is planned ahead, ``from_s`` at the earliest."""
        begin_s = max(self.free_s, from_s)
        for start_s, end_s in self._fixed:
            if begin_s + takes_s <= start_s:
                break
            begin_s = max(begin_s, end_s)
        return begin_s

    def plan(self, begin_s: float, takes_s: float) -> float:
        """Plan work ahead at what `start_s` has said; returns when it ends."""
        self.free_s = begin_s + takes_s
        while self._fixed and self._fixed[0][1] <= self.free_s:
            self._fixed.pop(0)
        return self.free_s

    def serve(self, from_s: float, takes_s: float) -> float:
        """Work at the time of its op, behind all there is; returns when it ends."""
        begin_s = max(from_s, self.free_s, self._fixed[-1][1] if self._fixed else 0.0)
        if takes_s > 0:
            self._fixed.append((begin_s, begin_s + takes_s))
        return begin_s + takes_s
