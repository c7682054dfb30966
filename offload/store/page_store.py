"""The page store of one model: arena, page files, mover and driver of one configuration, and the units put into them.

Parameters enter in the order in which they are met; neighbours whose modules are small share a unit up to one page. A
module's own parameters are split over units only where they do not fit (`offload.cutting.cut_parameter`). Made by
`offload.deferred_init` before the model, or by `offload.prepare` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor, nn

from offload.binding.bindings import Bindings
from offload.budget.need import Sizes, check_lockable, cut_for
from offload.commits.foreign_commits import SINGLE, ForeignCommits
from offload.commits.rank_run import RankRun, check_parts, open_rank_run
from offload.commits.run_commits import EarlierCommits
from offload.config import Config
from offload.cutting.cuttable import row_blocks
from offload.cutting.make_cut import cut_parameter, release
from offload.modules.conversions import guard_conversions
from offload.modules.saving import guard_saving
from offload.parameters.binder import Binder
from offload.parameters.grouping import Group, Neighbours, own_groups
from offload.parameters.inner_tensors import own_parameters, reveal_all
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.state_copies import StateCopies
from offload.store.device_placement import Candidate, choose_resident
from offload.store.device_tier import DeviceTier
from offload.store.new_units import UnitMaker
from offload.store.page_views import adopt_view
from offload.store.store_parts import StoreParts
from optim.unit import Unit, UnitIndex
from pagemem.budget import Budget
from pagemem.devices.arena import HostArena
from pagemem.folders.run_directory import RunDirectory
from pagemem.process import forks, interrupts
from pagemem.process.closing import close_all
from pagemem.ranks.comm_lane import CommLane
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import Counters
from pagemem.tier import Tag, Tier


class PageStore:
    """Everything that outlives single steps, owned by one engine. Training thread only.

    Args:
        config: the resolved configuration.
        parts: makes what the store is made of; None: what the configuration asks for.

    Attributes:
        given_back: `close` has come to its end.

    Raises:
        RunDirectoryError: a page-file path is foreign, locked or not writable; it was not changed.
        MemoryError: the arena cannot be mapped, or the device has no room for its own. DeviceError: there is no such
            device.
    """

    def __init__(self, config: Config, parts: StoreParts | None = None) -> None:
        self.config = config
        self.parts = parts or StoreParts(config)
        ram_bytes, sizes = config.memory.ram, Sizes.of(config)
        self.compute_dtype = sizes.compute_dtype
        self.counters = Counters()
        self.accelerator = None if config.device == "cpu" else self.parts.accelerator()
        self.budget = Budget(Tier.HOST, ram_bytes)
        self.index = UnitIndex()
        self._watched: WeakSet[nn.Module] = WeakSet()
        self._unhook: list[Callable[[], None]] = []
        self.closed = self.has_engine = self.narrowed = self.given_back = False
        interrupts.guard(self)
        with ExitStack() as undo:
            undo.callback(interrupts.unguard, self)
            self.collectives = self.parts.collectives()
            self.rank_run: RankRun | None = None
            self.earlier = self._open_run(undo)
            # A run that goes on keeps the sizes it was begun with.
            self.page_bytes, self.slice_numel = self.earlier.sizes(
                sizes.page_bytes, sizes.slice_numel, config.memory.page, checksums=config.ssd.checksums
            )
            self.cut_sizes = self.earlier.cut_sizes(sizes, self.page_bytes, self.slice_numel)
            n_frames = ram_bytes // self.page_bytes
            self._arena_bytes = self.budget.reserve(Tag.STAGING, n_frames * self.page_bytes, "host arena")
            arena = self.parts.arena(n_frames, self.page_bytes)
            undo.callback(arena.close)
            self.page_files = self.parts.page_files(self.directories, self.page_bytes)
            undo.callback(self.page_files.close)
            self.sources = self.parts.source_files(self.page_files)
            self.mover = HostMover(arena, self.page_files, self.counters, self.sources)
            self.earlier.restore(self.mover.copies)
            self.driver = self.parts.driver(self.mover, self.counters)
            self.comm = None if self.collectives is None else CommLane(self.collectives, self.counters)
            if self.comm is not None:
                undo.callback(self.comm.close)
                self.driver.add_ranks(self.comm)
            self.device_tier: DeviceTier | None = None
            if self.accelerator is not None and config.memory.device is not None:
                self.device_tier = DeviceTier(
                    config.memory.device, self.driver, self.mover, self.counters, self.accelerator,
                    self.parts.connect,
                )  # fmt: skip
            undo.pop_all()
        self._neighbours = Neighbours(self.page_bytes)
        self.binder = Binder(self.driver, self.mover, Bindings, self.parts.device, StateCopies(self.parts.spill_folder))
        self.binder.owner = self
        made_here = self.mover, self.driver, self.binder, self.index, self.sources
        self.maker = UnitMaker(config, self.page_bytes, self.slice_numel, *made_here, self.parts.device)
        forks.disown_in_children(self)

    def _open_run(self, undo: ExitStack) -> EarlierCommits:
        """Lock the folders of the page files, and see what other commits the run has; returns those in them."""
        self.directories: list[RunDirectory] = []
        paths = [Path(path) for path in self.config.ssd.paths]
        if self.collectives is None:
            for path in paths:
                directory = RunDirectory(path)
                undo.callback(directory.close)
                self.directories.append(directory)
            self.foreign = ForeignCommits(paths, SINGLE)
            return EarlierCommits(self.directories)
        try:
            self.rank_run, self.directories = open_rank_run(self.config, self.collectives, undo)
            found = EarlierCommits(self.directories, self.rank_run.numbers)
            usable = [number for number in self.rank_run.numbers if number not in found.damaged]
            all_usable = check_parts(self.rank_run, usable)
            found.leave_out(set(usable) - set(all_usable), "another rank's part of it is damaged")
            self.foreign = ForeignCommits(paths, self.rank_run.shape)
        except Exception as error:
            self.collectives.stop(f"{type(error).__name__}: {error}")
            raise
        return found

    # ---- parameters --------------------------------------------------------------------------------------------

    def add_module(self, name: str, module: nn.Module) -> None:
        """Move a module's own ordinary parameters into pages, with small neighbours of the same dtype.

        Raises:
            BudgetError: the arena cannot hold the unit; parameters of earlier modules are paged, this one's are whole.
        """
        if self.closed:
            raise self.binder.refusal(name)
        reveal_all(module.parameters(recurse=False))
        for key, parameter in own_parameters(module):
            adopt_view(self.binder, self.index.units, f"{name}.{key}" if name else key, parameter)
        blocks = row_blocks([(name, module)])
        for group in own_groups(
            name, module, lambda p: isinstance(p, PagedParameter) or p in self._neighbours or self.awaits_values(p)
        ):
            for part in self.cut(group, blocks):
                for unit in self._neighbours.take(part):
                    self.maker.make(unit)
        release(module.parameters(recurse=False))

    def cut(self, group: Group, blocks: Mapping[int, int]) -> list[Group]:
        """Cut parameters of a group that do not fit; returns the groups it becomes. `release` them once all are in
        pages.

        Args:
            blocks: which can be cut, as `row_blocks` says.
        """
        return cut_for(group, blocks, self.cut_sizes, cut_parameter)

    def awaits_values(self, parameter: Tensor) -> bool:
        """Whether a parameter was left on meta, to be set later."""
        return parameter.is_meta and self.parts.device != "meta"

    def flush(self) -> None:
        """Make a unit of the parameters that wait for neighbours."""
        for unit in self._neighbours.flush():
            self.maker.make(unit)

    def watch_over(self, module: nn.Module) -> None:
        """Until the store is closed, a module's ``state_dict()`` returns copies, and `guard_conversions` and
        `guard_saving` hold for it. Idempotent."""
        if module not in self._watched:
            self._watched.add(module)
            self._unhook += self.binder.state_copies.watch(module)
            self._unhook.append(guard_conversions(module, self.binder, self._neighbours.__contains__))
            self._unhook += guard_saving(module, self._files_in_use)

    def _files_in_use(self) -> set[Path]:
        """Files of others in which parameters lie."""
        tensors = list(self.mover.tensors.values())
        return {file.path for tensor in tensors if tensor.origin is not None for file in tensor.origin.files}

    def replace(self, unit: Unit, made: PagedTensor) -> None:
        """Have a unit go on in ``made``, which holds what it keeps of its values; its old pages are given back."""
        self.driver.quiesce()
        del self.binder.units[unit.parameters.id]
        self.mover.forget(unit.parameters)
        unit.parameters = made
        self.binder.units[made.id] = unit

    def narrow(self, unit: Unit, made: PagedTensor, dtype: torch.dtype) -> None:
        """Have a unit go on in ``made``, which holds its values in another dtype; its old pages are given back."""
        self.replace(unit, made)
        unit.dtype, self.narrowed = dtype, True
        for slot in unit.slots:
            slot.dtype, slot.edited = dtype, False

    def updated(self, unit: Unit) -> None:
        """A unit's parameters have changed in host memory."""
        if self.device_tier is not None and unit.device is not None:
            self.device_tier.renewed(unit.device)

    def compute_on(self, tier: DeviceTier) -> None:
        """Have compute use the device's copies of all units from now on.

        Raises:
            BudgetError: the device cannot hold a unit; names the smallest budget that can.
        """
        self.driver.quiesce()
        mirrors = {unit: tier.mirror(unit) for unit in self.index.units}
        for unit, mirror in mirrors.items():
            unit.device = mirror
        self.binder.compute_on(tier.mover, tier.mover.accelerator.torch_device, self.index.units)

    def make_resident(self, *, sums: bool) -> None:
        """Make as many units device-resident as have room beside those that are streamed; once all have their states.

        Args:
            sums: whether gradients are added up before they are used: clipped, scaled, or of several backward passes.

        Raises:
            As `DeviceTier.make_resident`.
        """
        tier = self.device_tier
        if tier is None or self.config.memory.device_states == "never":
            return
        units = self.index.units
        chosen = choose_resident([Candidate.of(unit, sums=sums) for unit in units], tier.mover.arena.n_frames)
        tier.make_resident([units[index] for index in chosen], sums=sums)

    def lasting(self) -> list[PagedTensor]:
        """All tensors of host memory but those that are gathered from others."""
        return [tensor for tensor in self.mover.tensors.values() if tensor.id not in self.mover.gathered]

    def set_order(self) -> None:
        """Have what is fetched on demand be read ahead in the model's order, now that all pages are known.

        In lock-free mode that is parameters only: states come and go with the update thread.
        """
        tensors = [unit.parameters for unit in self.index.units]
        if not self.config.update.lock_free:
            parts = [part for unit in self.index.units for part in unit.slices]
            tensors += [tensor for part in parts for tensor in (part.master, part.states) if tensor is not None]
        self.driver.memories.set_order(tensors)

    def forget(self, unit: Unit) -> None:
        """Free the pages of a unit, of which there must be no views. Using its parameters raises from now on."""
        unit.forgotten = True
        if unit in self.index.units:
            self.index.units.remove(unit)
        self.driver.quiesce()
        self.mover.collect_leases()
        del self.binder.units[unit.compute.id]
        states = [tensor for part in unit.slices for tensor in (part.master, part.states) if tensor is not None]
        for tensor in [unit.parameters, *states]:
            self.mover.forget(tensor)

    # ---- sizes -------------------------------------------------------------------------------------------------

    def resize_arena(self, n_frames: int) -> None:
        """Go on with ``n_frames`` host frames, all empty; the rest of the budget is for what lies outside the arena.

        Once, when all sizes are known: from here on they are pinned, where there is a device that copies from them.

        Raises:
            MemoryError: there is not as much RAM left, or it cannot be mapped.
        """
        self.driver.evict_all()
        pin = None if self.accelerator is None else self.accelerator.pin
        # What was touched until now is given back before all of it is locked.
        if n_frames != self.mover.arena.n_frames or pin is not None:
            self.mover.replace_arena(lambda: self.parts.arena(n_frames, self.page_bytes))
            self._arena_bytes.resize(self.mover.arena.n_bytes)
        if pin is not None:
            check_lockable(self.config.memory.ram)
            assert isinstance(self.mover.arena, HostArena)
            self.mover.arena.pin(pin)
        self.driver.memories.set_overhead(self.config.memory.ram - n_frames * self.page_bytes)

    def bytes_by_tag(self, direct_gradient_bytes: int) -> dict[str, int]:
        """Bytes of host memory by what they are held for; gradients outside the arena are given."""
        found: dict[str, int] = {Tag.GRAD.value: direct_gradient_bytes} if direct_gradient_bytes else {}
        for tensor in self.mover.tensors.values():
            if tensor.frame is not None:
                found[tensor.tag.value] = found.get(tensor.tag.value, 0) + tensor.n_frames * self.page_bytes
        return found

    def close(self) -> None:
        """Stop all moves, end all threads, close and unlock the page files, give the arena back. Idempotent.

        Raises:
            StorageError: a background copy had failed, unreported so far; everything is closed all the same.
        """
        if self.given_back:
            return
        self.closed = True
        self.binder.close()
        for unhook in self._unhook:
            unhook()
        close_all(
            self.driver.quiesce,
            *([] if self.comm is None else [self.comm.close]),
            *([] if self.device_tier is None else [self.device_tier.close]),
            self.mover.close,
            self.sources.close,
            self.page_files.close,
            *(directory.close for directory in reversed(self.directories)),
            *(directory.close for directory in ([] if self.rank_run is None else self.rank_run.locked)),
            self._arena_bytes.end,
            self.mover.arena.close,
            self._end,
        )

    def disown(self) -> None:
        """In a forked child: everything is the parent's."""
        self.closed = self.given_back = True
        self.binder.disown()

    def _end(self) -> None:
        interrupts.unguard(self)
        self.given_back = True
