"""Whether ``memory.ram`` holds what a model's largest unit needs: asked before anything of it is paged, and while it is
built."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from offload.budget.need import BudgetNeed, UnitShape, budget_need
from offload.config import Config
from offload.parameters.grouping import Group, groups_of, units_of
from pagemem.devices.host_memory import usable_bytes
from pagemem.errors import BudgetError
from pagemem.units import format_bytes


def check_model(model: nn.Module, optimized: Collection[int], n_states: int, config: Config) -> None:
    """Before the engine pages anything: make sure that the largest unit will fit, also in its update.

    Args:
        optimized: ``id`` of every parameter that the optimizer has.
        n_states: states that the optimizer keeps for each element.

    Raises:
        BudgetError: it will not; names the unit and the smallest budget that works.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = groups_of(model.named_modules(), set())

    def units_at(page_bytes: int) -> Iterator[UnitShape]:
        return (UnitShape.of(group, names, optimized) for group in units_of(groups, page_bytes))

    if groups:
        budget_need(units_at, n_states, config, config.memory.ram).check(config.memory.ram)


def check_built(named: Group, config: Config, page_bytes: int) -> None:
    """While a model is built, of which only what has been built so far is known: make sure that a group of parameters
    fits.

    Raises:
        BudgetError: it does not; names it, and what it needs.
    """
    ram_bytes, names = config.memory.ram, {id(parameter): name for name, parameter in named}
    if UnitShape.of(named, names, ()).built_frames(page_bytes) * page_bytes <= ram_bytes:
        return

    def need_of(unit: UnitShape) -> BudgetNeed:
        return budget_need(lambda _: [unit], config.optimizer.n_states, config, ram_bytes)

    built, trained = need_of(UnitShape.of(named, {}, ())), need_of(UnitShape.of(named, names, names))
    raise BudgetError(
        f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), but {trained.unit}, which is being built, "
        f"needs at least {built.smallest_bytes} bytes ({format_bytes(built.smallest_bytes)}) for its parameters "
        f"alone, and {trained.smallest_bytes} bytes ({format_bytes(trained.smallest_bytes)}) if the optimizer of the "
        "configuration trains it. Modules not built yet may need more: offload.smallest_budget(factory, optimizer, "
        "config) says what the whole model needs",
        built.smallest_bytes,
    )


def check_lockable(ram_bytes: int) -> None:
    """Before all of ``memory.ram`` is locked in RAM: the system would end this process, or another, for want of it.

    Raises:
        MemoryError: there is less left than that.
    """
    left_bytes = usable_bytes()
    if ram_bytes > left_bytes:
        raise MemoryError(
            f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), all of it to be locked in RAM for copies "
            f"by the device, but this machine, or the cgroup's memory.max, has {left_bytes} bytes "
            f"({format_bytes(left_bytes)}) left; lower memory.ram below that"
        )
