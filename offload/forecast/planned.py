"""The plan that a rehearsed engine has, and what it is simulated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.forecast.late_costs import with_late_costs
from offload.forecast.rehearsal import Rehearsal
from pagemem.frames.page import TensorId
from scheduler.planning.machine import SharedRate
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane
from scheduler.planning.work import Work


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and its work, with the names of its tensors."""

    plan: Plan
    work: Work
    names: Mapping[TensorId, str]


def planned(engine: Rehearsal) -> Planned:
    """Of an engine that has rehearsed its steps."""
    plan, trace, planner = engine.driver.follower.plan, engine.driver.follower.trace, engine.driver.planner
    assert plan is not None
    work, disk = planner.work(trace, share=1), engine.rates
    rates = {Lane.SSD_READ: disk.ssd_read, Lane.SSD_WRITE: disk.ssd_write}
    limit = disk.ssd_limit
    shared = () if limit is None else (SharedRate(frozenset(rates), limit),)
    machine = replace(work.machine, bytes_per_s={**work.machine.bytes_per_s, **rates}, shared=shared)
    names = {tensor: planner.tensor(tensor).name for tensor in planner.tiers()}
    return Planned(plan, with_late_costs(replace(work, machine=machine), engine), names)
