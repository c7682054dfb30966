"""Adopting new parameters: copying the newest published version of a unit into its pages. Training thread only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from optim.gradient_budget import GradientBudget
from optim.lockfree.unit_channel import UnitChannel, Version
from optim.unit import Unit
from scheduler.execution.driver import Driver
from scheduler.execution.plan_follower import Mode
from scheduler.planning.trace import Access, AccessMode, OpKind


class Adoption:
    """Adopts versions, and returns the bytes they held to the budget.

    Args:
        driver: gives host pages and keeps the trace.
        channels: of all units that are optimized.
        budget: of gradients and versions on their way.
    """

    def __init__(self, driver: Driver, channels: Mapping[Unit, UnitChannel], budget: GradientBudget) -> None:
        self._driver = driver
        self._channels = channels
        self._budget = budget

    def adopt(self, unit: Unit, when: str, *, may: bool = True) -> None:
        """Copy the newest published parameters, if they are newer and ``may`` be used now, into the unit's pages."""
        self.collect_freed()
        version = self._channels[unit].unadopted() if may else None
        if unit.parameters.resident:
            if version is None:
                return
            with self._driver.mover.changed:
                self._driver.mover.make_writable(unit.parameters)
                self._driver.mover.touch(unit.parameters)
            self._copy_in(unit, version)
        elif version is not None or self._driver.follower.mode is not Mode.PLANNED:
            # A step that is being traced has the op in any case: a later one may have something to adopt there.
            accesses = [Access(unit.parameters.id, AccessMode.MODIFY)]
            with self._driver.op((OpKind.UPDATE, (unit.index, "adopt", when)), f"adoption of {unit.name}", accesses):
                if version is not None:
                    self._copy_in(unit, version)
        if version is not None:
            self._adopted(unit, version)
            unit.ended |= when == "after"

    def adopt_without_moves(self, units: Iterable[Unit]) -> bool:
        """Adopt versions, for the bytes they hold, of those units that lie in memory and that nobody sees before their
        next use; returns whether there were any.

        Which units these are differs from step to step, so it is no op of the step: nothing is moved for it.
        """
        found = False
        for unit in units:
            with self._driver.in_passing(unit.parameters) as in_memory:
                version = self._channels[unit].unadopted()
                if in_memory and version is not None:
                    self._copy_in(unit, version)
                    self._adopted(unit, version)
                    found = True
        return found

    def unseen_units(self) -> list[Unit]:
        """Units with newer parameters than those in use, which nobody sees before their next use."""
        return [
            unit for unit, channel in self._channels.items()
            if channel.unadopted() is not None and unit.live_views == 0 and not self._driver.viewed(unit.parameters)
        ]  # fmt: skip

    def is_unseen(self, unit: Unit) -> bool:
        """Whether nobody has a view of a unit's pages, or a commit that has yet to get what they hold."""
        return not unit.parameters.snapshot_pending and not self._driver.viewed(unit.parameters)

    def collect_freed(self) -> None:
        """Release the bytes of versions that newer ones have replaced."""
        for channel in self._channels.values():
            while channel.freed_bytes:
                self._budget.release(channel.freed_bytes.popleft())

    def _adopted(self, unit: Unit, version: Version) -> None:
        channel = self._channels[unit]
        channel.clock.adopt(version.last)
        unit.version += 1
        # A version that was published meanwhile has the values that it did not replace: they go when it does.
        newest = channel.version
        kept = {} if newest is None or newest is version else newest.values
        self._budget.release(sum(total.drop() for slot, total in version.values.items() if kept.get(slot) is not total))

    def _copy_in(self, unit: Unit, version: Version) -> None:
        for slot, total in version.values.items():
            if total.is_dropped:  # The updater did not know yet that it was adopted when it published the next one.
                continue
            view = self._driver.mover.tenants.view(unit.parameters, slot.dtype, slot.offset, slot.numel)
            view.copy_(total.flat)
