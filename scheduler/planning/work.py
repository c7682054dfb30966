"""What a plan is made of: the step, its tensors, the memory and the lanes. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler.planning.machine import Machine, TierSpec, machine_of
from scheduler.planning.sources import COPIES, TensorSource, chain_of
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import CHANGES, Conditional, Trace
from scheduler.planning.update_round import UpdateRound


@dataclass(frozen=True, slots=True)
class Work:
    """A step to be planned.

    Attributes:
        trace: its ops, with durations.
        n_bytes: size of every tensor in the trace, of what those are made of, and of what is resident.
        machine: budgets and lanes.
        resident: tensors that are in memory for good, in the trace or not, and their first frames.
        sources: what tensors are made of that are not made of their page files.
        tiers: of every tensor; `Work.of` finds them.
        updates: what a thread beside that of the step does meanwhile, in memory of its own.
        thread: the lane whose ops the thread performs that reaches them: with UPDATE, updates are not beside it.
        below: frames at the beginning of a tier that are not of this work.

    Raises:
        ValueError: a tensor is used in two tiers, is made of itself, or of its like by a task that copies nothing.
    """

    trace: Trace
    n_bytes: Mapping[TensorId, int]
    machine: Machine
    resident: Mapping[TensorId, FrameId] = field(default_factory=dict)
    sources: Mapping[TensorId, TensorSource] = field(default_factory=dict)
    tiers: Mapping[TensorId, Tier] = field(default_factory=dict)
    updates: UpdateRound | None = None
    thread: Lane = Lane.COMPUTE
    below: Mapping[Tier, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        trace: Trace,
        n_bytes: Mapping[TensorId, int],
        tiers: Machine | TierSpec,
        resident: Mapping[TensorId, FrameId] | None = None,
        sources: Mapping[TensorId, TensorSource] | None = None,
        resident_tiers: Mapping[TensorId, Tier] | None = None,
    ) -> Work:
        """Of a step, however its memory was said.

        Args:
            resident_tiers: where resident tensors are that no op uses, if not in host memory.
        """
        found: dict[TensorId, Tier] = dict(resident_tiers or {})
        sources = sources or {}
        for op in trace.ops:
            for access in op.accesses:
                _note(access.tensor, access.tier, sources, found)
                if access.mode in CHANGES and any(
                    link in sources and sources[link].kind is TaskKind.GATHER
                    for link in chain_of(access.tensor, sources)
                ):
                    raise ValueError(f"{op.name} changes tensor {access.tensor}, which is gathered; change its shard")
        for tensor in resident or {}:
            _note(tensor, found.get(tensor, Tier.HOST), sources, found)
        changed = {a.tensor: op.name for op in trace.ops for a in op.accesses if a.mode in CHANGES}
        for tensor in resident or {}:
            for below in list(chain_of(tensor, sources))[1:]:
                if below in changed:
                    raise ValueError(f"{changed[below]} changes what resident tensor {tensor} is a copy of")
        return cls(trace, n_bytes, machine_of(tiers), resident or {}, sources, found)

    def of_updates(self) -> Work:
        """The round of updates alone, as work of its thread."""
        updates = self.updates
        assert updates is not None
        end = updates.first_frame + updates.n_frames
        alone = Work.of(updates.trace, updates.n_bytes, replace(self.machine, n_frames={Tier.HOST: end}))
        return replace(alone, thread=Lane.UPDATE, below={Tier.HOST: int(updates.first_frame)})

    @property
    def page_bytes(self) -> int:
        """Of a frame."""
        return self.machine.page_bytes

    def frames(self, tensor: TensorId) -> int:
        """That a tensor takes."""
        return ceil_div(self.n_bytes[tensor], self.page_bytes)

    def room_frames(self, conditional: Conditional) -> int:
        """That the ``k`` largest of the tensors take together."""
        sizes = sorted((self.frames(tensor) for tensor in conditional.tensors), reverse=True)
        return sum(sizes[: conditional.k])


def _note(tensor: TensorId, tier: Tier, sources: Mapping[TensorId, TensorSource], found: dict[TensorId, Tier]) -> None:
    """A tensor is used in a tier, and so is what it is made of in its own."""
    if found.get(tensor) is tier and tensor not in sources:
        return
    for link in chain_of(tensor, sources):
        if found.setdefault(link, tier) is not tier:
            raise ValueError(
                f"tensor {link} is used in {found[link].value} and in {tier.value} memory; each copy needs its own id"
            )
        source = sources.get(link)
        if source is not None:
            if source.kind not in COPIES:
                raise ValueError(f"the source of tensor {link} is of kind {source.kind.value}, not upload or gather")
            tier = source.tier_below(tier)
