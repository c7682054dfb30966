"""When things happen: the trace of a step, the plan made from it, its check and simulation, and the driver that follows it."""

from scheduler.bounds import BoundsReport, PlanError, check_bounds
from scheduler.driver import Driver, Mode
from scheduler.gathers import Link, ShardedPlan, plan_sharded
from scheduler.plan import LoadTask, Plan, StoreTask
from scheduler.planner import make_plan
from scheduler.simulator import Lane, Simulation, Wait, simulate
from scheduler.trace import Access, AccessMode, Op, OpKey, OpKind, Trace, TraceRecorder
from scheduler.walk import Machine

__all__ = [
    "Access", "AccessMode", "BoundsReport", "Driver", "Lane", "Link", "LoadTask", "Machine", "Mode", "Op", "OpKey", "OpKind", "Plan",
    "PlanError", "ShardedPlan", "Simulation", "StoreTask", "Trace", "TraceRecorder", "Wait", "check_bounds", "make_plan", "plan_sharded", "simulate",
]
