"""When things happen: the trace of a step, the plan made from it, and the driver that follows the plan."""

from scheduler.driver import Driver, Mode
from scheduler.plan import LoadTask, Plan, StoreTask
from scheduler.planner import Machine, make_plan
from scheduler.trace import Access, AccessMode, Op, OpKey, OpKind, Trace, TraceRecorder

__all__ = [
    "Access", "AccessMode", "Driver", "LoadTask", "Machine", "Mode", "Op", "OpKey", "OpKind", "Plan", "StoreTask",
    "Trace", "TraceRecorder", "make_plan",
]
