"""What a plan moves when it is performed."""

from __future__ import annotations

from collections.abc import Mapping

from pagemem.frames.page import FrameId, TensorId
from pagemem.units import KiB
from scheduler.planning.bounds import Replay
from scheduler.planning.plan import Plan
from scheduler.planning.trace import Trace

PAGE_BYTES = 64 * KiB


def bytes_a_step(
    plan: Plan, trace: Trace, n_bytes: Mapping[TensorId, int], resident: Mapping[TensorId, FrameId] | None = None
) -> tuple[float, float]:
    """Bytes read and written a step, in the second cycle: in it tensors are dirty when it begins."""
    replay = Replay(trace, plan, n_bytes, PAGE_BYTES, resident or {})
    replay.cycle()
    read, written = replay.bytes_read, replay.bytes_written
    replay.cycle()
    return (replay.bytes_read - read) / plan.n_steps, (replay.bytes_written - written) / plan.n_steps
