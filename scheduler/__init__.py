"""When things happen: the trace of a step, the plan made from it, its check and simulation, and the driver that follows
it."""

from scheduler.execution.driver import Driver
from scheduler.execution.plan_follower import Mode
from scheduler.planning.bounds import BoundsReport, PlanError, check_bounds
from scheduler.planning.gathers import Link, ShardedPlan, plan_sharded
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import LoadTask, Plan, StoreTask
from scheduler.planning.planner import make_plan
from scheduler.planning.simulator import Lane, Simulation, Wait, simulate
from scheduler.planning.trace import Access, AccessMode, Op, OpKey, OpKind, Trace, TraceRecorder

__all__ = [
    "Access",
    "AccessMode",
    "BoundsReport",
    "Driver",
    "Lane",
    "Link",
    "LoadTask",
    "Mode",
    "Op",
    "OpKey",
    "OpKind",
    "Plan",
    "PlanError",
    "ShardedPlan",
    "Simulation",
    "StoreTask",
    "TierSpec",
    "Trace",
    "TraceRecorder",
    "Wait",
    "check_bounds",
    "make_plan",
    "plan_sharded",
    "simulate",
]
