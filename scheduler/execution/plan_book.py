"""The plans of steps that alternate, by their signatures: the ops of a step in order.

A step that comes again follows its own plan from its first op on where the step before foretells it, and otherwise from
the first op by which it differs from what was expected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pagemem.frames.page import TensorId
from scheduler import knobs
from scheduler.lookahead.next_uses import NextUses
from scheduler.planning.durations import Durations
from scheduler.planning.plan import Plan
from scheduler.planning.sources import COPIES, TensorSource
from scheduler.planning.task import ARRIVALS, Task
from scheduler.planning.trace import OpKey, Trace


class Signature:
    """The ops of a step, in order; hashed once."""

    __slots__ = ("_hash", "keys")

    def __init__(self, keys: tuple[OpKey, ...]) -> None:
        self.keys = keys
        self._hash = hash(keys)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Signature) and self._hash == other._hash and self.keys == other.keys)


@dataclass(slots=True)
class PlannedStep:
    """A kind of step that has a plan.

    Attributes:
        trace: the step, with the durations that the plan was made with.
        sources: what those of its tensors are copies of that are.
        durations: of the steps that followed the plan. n_steps: how many did, to the end and without a difference.
        joined: it has the ops of steps that differ, see `PlanBook.wanted`.
        signature: its ops. uses: when its tensors are used.
    """

    trace: Trace
    plan: Plan
    durations: Durations = field(default_factory=Durations)
    sources: Mapping[TensorId, TensorSource] = field(default_factory=dict)
    n_steps: int = 0
    joined: bool = False
    signature: Signature = field(init=False)
    uses: NextUses = field(init=False)
    _loaded_for: dict[TensorId, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.signature = Signature(self.trace.keys)
        copied_at: dict[TensorId, list[int]] = {}
        for task in self.plan.tasks:
            if task.kind in COPIES and not task.fresh and task.tensor in self.sources:
                copied_at.setdefault(self.sources[task.tensor].tensor, []).append(task.trigger)
        self.uses = NextUses(self.trace, copied_at)
        for task in (task for task in self.plan.tasks if task.kind in ARRIVALS):
            self._loaded_for.setdefault(task.tensor, []).append(task.needed_at % len(self.plan.keys))

    def serves(self, task: Task, position: int) -> bool:
        """Whether ops from ``position`` on use what a load brings before the plan brings it once more."""
        n_ops = len(self.plan.keys)
        others = (at for at in self._loaded_for.get(task.tensor, ()) if at != task.needed_at % n_ops)
        again = min(((at - position) % n_ops for at in others), default=n_ops)
        return self.uses.distance(task.tensor, position) < again


class WorthPlanning(NamedTuple):
    """What a plan is worth making for.

    Attributes:
        durations: of the steps it was measured in; None: it was not. joined: it has the ops of steps that differ.
    """

    trace: Trace
    durations: Durations | None = None
    joined: bool = False


class PlanBook:
    """The last plans, and which kind of step follows which. Training thread only."""

    def __init__(self) -> None:
        self._plans: dict[Signature, PlannedStep] = {}  # the least recently used first
        self._followers: dict[Signature, Signature] = {}
        self._seen: deque[int] = deque(maxlen=knobs.SIGNATURES_SEEN)
        self._novel: deque[bool] = deque(maxlen=knobs.KEPT_PLANS)
        self._last: Signature | None = None
        self._n_unplanned = 0
        self._joined: Signature | None = None  # of the plan that the next one takes the place of

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        """Forget all of them."""
        self._plans.clear()
        self._followers.clear()
        self._seen.clear()
        self._novel.clear()
        self._last, self._n_unplanned = None, 0

    def keep(self, planned: PlannedStep) -> None:
        """Keep a plan, in place of one of the same ops, or of the one that was not used for longest."""
        self._plans.pop(planned.signature, None)
        if self._joined is not None:
            self._plans.pop(self._joined, None)
            self._joined = None
        while len(self._plans) >= knobs.KEPT_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[planned.signature] = planned

    def of(self, signature: Signature) -> PlannedStep | None:
        """The plan of a kind of step."""
        return self._plans.get(signature)

    def beginning_with(self, performed: Sequence[OpKey], key: OpKey, but: PlannedStep) -> PlannedStep | None:
        """A plan of a step that begins with the ops performed and then ``key``; the one used last, and not ``but``."""
        n_ops = len(performed)
        for planned in reversed(self._plans.values()):
            keys = planned.signature.keys
            if planned is but or len(keys) <= n_ops or keys[n_ops] != key:
                continue
            if all(keys[index] == performed[index] for index in range(n_ops - 1, -1, -1)):
                return planned
        return None

    def ended(self, signature: Signature) -> bool:
        """A step of a kind has ended.

        Returns:
            Whether a plan is worth making for it: it has none, and came before, or few steps were new lately, or very
            many.
        """
        novel = hash(signature) not in self._seen
        self._seen.append(hash(signature))
        self._novel.append(novel)
        if self._last is not None:
            self._followers[self._last] = signature
            if len(self._followers) > knobs.SIGNATURES_SEEN:
                del self._followers[next(iter(self._followers))]
        self._last = signature
        known = self._plans.pop(signature, None)
        if known is not None:
            self._plans[signature] = known
            return False
        self._n_unplanned += 1
        worth = not self._plans or not novel or not self._mostly_novel or self._n_unplanned > knobs.KEPT_PLANS
        self._n_unplanned *= not worth
        return worth

    @property
    def _mostly_novel(self) -> bool:
        return sum(self._novel) > knobs.NOVEL_STEPS

    def wanted(self, followed: PlannedStep | None, trace: Trace) -> WorthPlanning | None:
        """A step has ended that no plan has, and ``followed`` one to some extent.

        Returns:
            What a plan is worth making for: that step; or, where it is a new one as nearly each is, one with the ops of
            it and of the plan followed, in the place of that: what a step leaves out costs less than ops that no plan
            has. None: nothing; so, too, where the plan followed is such a one and has all of the step's ops (and few
            more, if the kind came before), until the times of some steps are known.
        """
        worth, self._joined = self.ended(Signature(trace.keys)), None
        if followed is None:
            return WorthPlanning(trace) if worth else None
        trace.take_durations(followed.trace)
        if not (followed.joined or (self._novel[-1] and self._mostly_novel)):
            return WorthPlanning(trace) if worth else None
        both, n_ops = followed.trace.joined(trace), len(followed.trace.ops)
        longest = knobs.JOINED_GROWTH * max(n_ops, len(trace.ops))
        comes_again_shorter = not self._novel[-1] and len(trace.ops) < knobs.JOINED_SERVES * len(both.ops)
        if len(both.ops) > longest or comes_again_shorter:
            return WorthPlanning(trace) if worth else None
        if len(both.ops) > n_ops:
            self._joined = followed.signature
            return WorthPlanning(both, joined=True)
        refined = followed.durations.add(followed.trace, trace.joined(followed.trace)) if followed.joined else None
        return None if refined is None else WorthPlanning(refined, followed.durations, joined=True)

    def expected(self) -> PlannedStep | None:
        """The plan that the next step is expected to follow; None: there are no plans."""
        known = None if self._last is None else self._plans.get(self._last)
        if known is None:
            return next(reversed(self._plans.values()), None)
        return self.expected_after(known)

    def expected_after(self, planned: PlannedStep) -> PlannedStep:
        """The plan that is expected to be followed after a step of one's kind: mostly the same."""
        signature = planned.signature
        return self._plans.get(self._followers.get(signature, signature)) or planned
