"""What a model needs of the budget at once, and the smallest budget that has it: what the largest unit needs, and in
lock-free mode what that mode keeps in RAM of the whole model (`offload.budget.lock_free`).

A budget decides on the size of pages and of slices of optimizer states, and so on what it must hold itself: the
smallest one that works is the first that holds what is needed at that budget's own sizes. A larger one, at which pages
or slices become larger, may need more than it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import torch
from torch import nn

from offload import knobs
from offload.budget.cuts import cuts_of, split, standins
from offload.budget.lock_free import LockFreeBudget, UnitSize, remedy, shortfall
from offload.config import Config, resolve_page_bytes
from offload.cutting.cuttable import row_blocks
from offload.parameters.grouping import Group, common_name, groups_of, units_of
from offload.parameters.inner_tensors import all_parameters, owner_of
from optim.layout import cut, largest_slice, lay_out
from pagemem.devices.host_memory import usable_bytes
from pagemem.errors import BudgetError
from pagemem.frames.page import MIN_PAGE_BYTES
from pagemem.units import ceil_div, format_bytes

#: States that any optimizer keeps for an element.
_MOST_STATES: Final = 2
#: What parameters become; None: they stay as they are built.
COMPUTE_DTYPES: Final[dict[str, torch.dtype | None]] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a configuration says of sizes, for a budget of ``ram_bytes``.

    Attributes:
        cuts: whether parameters that do not fit are cut into slices.
    """

    ram_bytes: int
    page_bytes: int
    slice_numel: int
    compute_dtype: torch.dtype | None
    cuts: bool = False

    @classmethod
    def of(cls, config: Config, ram_bytes: int | None = None) -> Sizes:
        """Sizes for the configuration's budget, or for another one."""
        ram_bytes = config.memory.ram if ram_bytes is None else ram_bytes
        page = config.memory.page
        least, most = knobs.SLICE_NUMEL["lock-free" if config.update.lock_free else "exact"]
        most *= min(1 << max(0, (ram_bytes // knobs.LARGE_BUDGET_BYTES).bit_length() - 1), knobs.MOST_SLICE_GROWTH)
        return cls(
            ram_bytes,
            resolve_page_bytes(ram_bytes) if page == "auto" else int(page),
            min(max(1 << (ram_bytes // 128).bit_length(), least), most),
            None if config.model is None else COMPUTE_DTYPES[config.model.dtype],
            not config.update.lock_free and config.device == "cpu",
        )

    def fits(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a unit of so many elements fits while it is built and while it is updated, with as many states as any
        optimizer keeps: what is cut is not to depend on which one comes."""
        shape = UnitShape("", numel, dtype, trained=True)
        return shape.frames(self, _MOST_STATES) * self.page_bytes <= self.ram_bytes


@dataclass(frozen=True, slots=True)
class UnitShape:
    """A unit before it has any pages.

    Attributes:
        dtype: of its parameters as they are built.
        trained: whether the optimizer has some of them.
        kept: whether the model has some of them; the pages of other units are given back once it is built.
        optimized_numel: elements of those that the optimizer has.
    """

    name: str
    numel: int
    dtype: torch.dtype
    trained: bool
    kept: bool = True
    optimized_numel: int = 0

    @classmethod
    def of(cls, group: Group, names: Mapping[int, str], optimized: Collection[int]) -> UnitShape:
        """The shape of a group.

        Args:
            names: the model's names of its parameters, by ``id``.
            optimized: ``id`` of every parameter that the optimizer has.
        """
        numel = lay_out([(name, parameter.shape) for name, parameter in group]).numel
        owners = [(name, parameter, id(owner_of(parameter))) for name, parameter in group]
        name = common_name([_called(name, names.get(owner)) for name, _, owner in owners])
        trained = [parameter.numel() for _, parameter, owner in owners if owner in optimized]
        kept = any(owner in names for _, _, owner in owners)
        return cls(name, numel, group[0][1].dtype, bool(trained), kept, sum(trained))

    def frames(self, sizes: Sizes, n_states: int) -> int:
        """The most pages that the unit needs at once: while it is built, narrowed or updated."""
        built = self.built_frames(sizes.page_bytes)
        if not self.kept:
            return built
        dtype = sizes.compute_dtype or self.dtype
        part_numel = largest_slice(self.numel, sizes.slice_numel)
        master = ceil_div(part_numel * 4, sizes.page_bytes) * (self.trained and dtype is not torch.float32)
        states = ceil_div(part_numel * 4 * n_states, sizes.page_bytes)
        computed = ceil_div(self.numel * dtype.itemsize, sizes.page_bytes)
        needs = [built + master]
        if dtype is not self.dtype:
            needs.append(built + computed)
        if self.trained:
            needs.append(2 * computed + master + states)
        return max(needs)

    def size(self, sizes: Sizes) -> UnitSize:
        """What it takes once the model is built, for lock-free mode."""
        slices = [part.numel for part in cut(self.numel, sizes.slice_numel)] if self.trained else []
        dtype = sizes.compute_dtype or self.dtype
        return UnitSize(dtype, self.numel, self.gradient_bytes(sizes.compute_dtype), slices)

    def gradient_bytes(self, compute_dtype: torch.dtype | None) -> int:
        """Bytes of the gradients of all parameters that the optimizer has, once the model is built."""
        return self.optimized_numel * (compute_dtype or self.dtype).itemsize if self.kept else 0

    def content_bytes(self, compute_dtype: torch.dtype | None, n_states: int) -> int:
        """Bytes of the parameters, of their masters and states, once the model is built."""
        dtype = compute_dtype or self.dtype
        master_bytes = 4 if self.trained and dtype is not torch.float32 else 0
        return self.numel * (dtype.itemsize + master_bytes + 4 * n_states * self.trained) if self.kept else 0

    def built_frames(self, page_bytes: int) -> int:
        """Pages of the parameters as they are built."""
        return ceil_div(self.numel * self.dtype.itemsize, page_bytes)


@dataclass(frozen=True, slots=True)
class BudgetNeed:
    """The smallest ``memory.ram`` that works, and why.

    Attributes:
        unit: name of the unit that needs most.
        unit_bytes: bytes of its parameters as they are built.
        smallest_bytes: the smallest budget that holds all that is needed at once.
        content_bytes: of all parameters, masters and optimizer states together, in RAM and on SSD.
        lock_free_bytes: of the gradients of the whole model, which lock-free mode keeps in RAM; 0 in exact mode.
        next_bytes: the smallest budget that works and is no smaller than the configuration's; 0: as ``smallest_bytes``.
    """

    unit: str
    unit_bytes: int
    smallest_bytes: int
    content_bytes: int = 0
    lock_free_bytes: int = 0
    next_bytes: int = field(default=0, compare=False)

    @property
    def needed_bytes(self) -> int:
        """The configuration's budget, if that works, or else the next larger one that does."""
        return max(self.smallest_bytes, self.next_bytes)

    @property
    def remedy(self) -> str:
        """What to change where the budget is smaller."""
        return remedy(self.needed_bytes) if self.lock_free_bytes else f"set memory.ram to at least {self.needed_bytes}"

    def said(self, ram_bytes: int) -> str:
        """How such a budget falls short."""
        if self.lock_free_bytes:
            return shortfall(ram_bytes, self.lock_free_bytes, self.needed_bytes)
        return (
            f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), but the largest unit, {self.unit} "
            f"({self.unit_bytes} bytes of parameters), needs {self.needed_bytes} bytes "
            f"({format_bytes(self.needed_bytes)}) at once with its gradients and one slice of states"
        )

    def check(self, ram_bytes: int) -> None:
        """Raise BudgetError for a budget that is smaller."""
        if self.needed_bytes > ram_bytes:
            raise BudgetError(f"{self.said(ram_bytes)}; {self.remedy}", self.needed_bytes)


def shapes_of(
    model: nn.Module,
    optimized: Collection[int],
    dropped: Sequence[Group] = (),
    blocks: Mapping[int, int] | None = None,
) -> Callable[[Sizes], list[UnitShape]]:
    """The units of a model for what a budget has for sizes.

    Args:
        optimized: ``id`` of every parameter that the optimizer has.
        dropped: parameters that are built and not kept, which need pages until the model is whole.
        blocks: which parameters can be cut, as `row_blocks` says; None: ask it of the model.
    """
    names = {id(parameter): name for name, parameter in all_parameters(model)}
    groups = groups_of(model.named_modules(), set())
    blocks = row_blocks(model.named_modules()) if blocks is None else blocks

    def units_at(sizes: Sizes) -> list[UnitShape]:
        kept = [part for group in groups for part in cut_for(group, blocks, sizes)]
        rest = [part for group in dropped for part in cut_for(group, blocks, sizes)]
        return [UnitShape.of(group, names, optimized) for group in [*units_of(kept, sizes.page_bytes), *rest]]

    return units_at


def cut_for(
    group: Group,
    blocks: Mapping[int, int],
    sizes: Sizes,
    slices_of: Callable[[nn.Parameter, Sequence[int]], Iterable[nn.Parameter]] = standins,
) -> list[Group]:
    """The groups that a group becomes where it does not fit.

    Args:
        blocks: which parameters can be cut, as `row_blocks` says.
        slices_of: makes the slices; by default, what only has their shapes.
    """
    cuts = cuts_of(group, blocks, sizes.fits) if sizes.cuts else {}
    return split(group, cuts, slices_of) if cuts else [group]


def _called(name: str, known: str | None) -> str:
    """The model's name of a parameter, or of a slice of it."""
    if known is None:
        return name
    return known + name[name.rindex("[") :] if name.endswith("]") and not known.endswith("]") else known


def budget_need(
    units_at: Callable[[Sizes], Sequence[UnitShape]], n_states: int, config: Config, from_bytes: int = MIN_PAGE_BYTES
) -> BudgetNeed:
    """What all units of a model need.

    Args:
        units_at: the units, at least one, for what a budget has for sizes.
        n_states: states that the optimizer keeps for each element.
        from_bytes: smaller budgets are not looked at.
    """
    ram_bytes, units_at, lock_free_bytes = from_bytes, cache(units_at), 0
    while True:
        sizes = Sizes.of(config, ram_bytes)
        units = units_at(sizes)
        frames, unit = max(((unit.frames(sizes, n_states), unit) for unit in units), key=lambda pair: pair[0])
        need_bytes = frames * sizes.page_bytes
        if config.update.lock_free:
            lock_free_bytes = sum(unit.gradient_bytes(sizes.compute_dtype) for unit in units)
            need_bytes = max(need_bytes, lock_free_bytes)
            if need_bytes <= ram_bytes and any(unit.kept for unit in units):
                need_bytes = max(need_bytes, _lock_free(units, n_states, sizes, config).smallest_bytes)
        if need_bytes <= ram_bytes:
            content_bytes = sum(unit.content_bytes(sizes.compute_dtype, n_states) for unit in units)
            unit_bytes = unit.numel * unit.dtype.itemsize
            return BudgetNeed(unit.name, unit_bytes, ram_bytes, content_bytes, lock_free_bytes)
        # Sizes change at powers of two only; with larger ones, less may be needed.
        ram_bytes = min(need_bytes, 1 << ram_bytes.bit_length())


def _lock_free(units: Iterable[UnitShape], n_states: int, sizes: Sizes, config: Config) -> LockFreeBudget:
    unit_sizes = [unit.size(sizes) for unit in units if unit.kept]
    return LockFreeBudget(unit_sizes, n_states, sizes.page_bytes, config.update.threads)


# ---- before and while parameters are paged ---------------------------------------------------------------------------


def check_model(model: nn.Module, optimized: Collection[int], n_states: int, config: Config) -> None:
    """Before the engine pages anything: make sure that the largest unit will fit, also in its update.

    Args:
        optimized: ``id`` of every parameter that the optimizer has.
        n_states: states that the optimizer keeps for each element.

    Raises:
        BudgetError: it will not; names the unit and the smallest budget that works.
    """
    units_at = shapes_of(model, optimized)
    if units_at(Sizes.of(config)):
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
