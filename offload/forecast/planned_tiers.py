"""The plans that a rehearsed engine has, and what they are simulated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.forecast.rates import Rates
from offload.forecast.rehearsal import Rehearsal
from pagemem.frames.page import TensorId
from scheduler.execution.driver import Driver
from scheduler.planning.machine import SharedRate, machine_of
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane
from scheduler.planning.work import Work


@dataclass(frozen=True, slots=True)
class PlannedTier:
    """A plan and its work.

    Attributes:
        names: of tensors. above: whether the plan is that of the device, whose lanes are copies to and from it.
    """

    plan: Plan
    work: Work
    names: Mapping[TensorId, str]
    above: bool


def planned_tiers(engine: Rehearsal) -> list[PlannedTier]:
    """Of an engine that has rehearsed its steps: the plan of host memory, and that of the device, if there is one."""
    found = [_planned(engine.host, engine.rates)]
    if engine.upper is not None:
        found.append(_planned(engine.upper, None))
    return found


def _planned(driver: Driver, disk: Rates | None) -> PlannedTier:
    """A plan with lanes as fast as ``disk`` says, where they go to page files; None: as the driver was told."""
    plan, trace, planner = driver.follower.plan, driver.follower.trace, driver.planner
    assert plan is not None
    machine = machine_of(planner.tier(share=1))
    if disk is not None:
        rates = {Lane.SSD_READ: disk.ssd_read, Lane.SSD_WRITE: disk.ssd_write}
        limit = disk.ssd_limit
        shared = () if limit is None else (SharedRate(frozenset(rates), limit),)
        machine = replace(machine, bytes_per_s=rates, shared=shared)
    work = Work.of(trace, planner.n_bytes(trace), machine, planner.resident())
    names = {tensor.id: tensor.name for tensor in driver.mover.tensors.values()}
    return PlannedTier(plan, work, names, disk is None)
