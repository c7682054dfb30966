"""When things happen: the trace of a step, the plan made from it, its check and simulation, and the driver that follows
it."""

from scheduler.execution.driver import Driver
from scheduler.planning.bounds import PlanError, check_bounds
from scheduler.planning.gathers import Link, ShardedPlan, plan_sharded
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.planner import make_plan
from scheduler.planning.simulator import Simulation, simulate
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace, TraceRecorder

__all__ = [
    "Access",
    "AccessMode",
    "Driver",
    "Link",
    "Op",
    "OpKind",
    "Plan",
    "PlanError",
    "ShardedPlan",
    "Simulation",
    "TierSpec",
    "Trace",
    "TraceRecorder",
    "check_bounds",
    "make_plan",
    "plan_sharded",
    "simulate",
]
