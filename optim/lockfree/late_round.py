"""The updater's round over its units, as the planner sees it: an op for each slice of optimizer states."""

from __future__ import annotations

from collections.abc import Sequence

from optim.unit import Unit
from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.task import Lane
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.update_round import RoundUnit, UpdateRound


def round_of(units: Sequence[Unit], first_frame: FrameId, n_frames: int, max_staleness: int) -> UpdateRound:
    """The round over units that are updated late.

    Args:
        units: in the order of the round, with states and masters.
        first_frame, n_frames: the updater's part of host memory.
        max_staleness: steps that parameters may miss.
    """
    ops: list[Op] = []
    found: list[RoundUnit] = []
    n_bytes: dict[TensorId, int] = {}
    for unit in units:
        begin = len(ops)
        for place, part in enumerate(unit.slices):
            tensors = [tensor for tensor in (part.states, part.master) if tensor is not None]
            n_bytes.update((tensor.id, tensor.n_bytes) for tensor in tensors)
            accesses = tuple(Access(tensor.id, AccessMode.MODIFY) for tensor in tensors)
            key = (OpKind.UPDATE, (unit.index, place, "late"))
            ops.append(Op(key, f"update {place} of {unit.name}", accesses, 0.0, len(ops), Lane.UPDATE))
        found.append(RoundUnit(unit.name, unit.parameters.id, range(begin, len(ops))))
    return UpdateRound(Trace(tuple(ops)), n_bytes, first_frame, n_frames, tuple(found), max_staleness)
