"""A rehearsal: the first steps of an engine on torch's meta device, where tensors have shapes and no bytes.

Store, mover, driver, updater and interception are the engine's own; only what would hold bytes is not there: the host
arena hands out meta tensors, and the page files move nothing, at once. So units, slices, pages, ops and their order are
those of a real run, and the plan is made of them by the same planner. What differs is time: an op takes as long as its
kernels do (`offload.forecast.kernels`). Tensors outside of the pages are followed from the op that makes them to their
end, and so counted.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from offload.config import Config
from offload.engine import Engine
from offload.forecast.kernels import CostMode
from offload.forecast.meta_tier import AttentionOfCpu, MetaArena, MetaDevice, NoFiles, NoSources, RowsOfOneSequence
from offload.forecast.rates import Rates
from offload.parallel.shareable import check_shareable, shards_of
from offload.parallel.silent_ranks import SilentRanks
from offload.parameters.optimizer_template import OptimizerLike
from offload.profiling.live_storages import Holder, LiveStorages
from offload.store.deferred_init import built_into
from offload.store.page_store import PageStore
from offload.store.store_parts import StoreParts
from optim.lockfree.unit_channel import GradientSum, UnitChannel
from optim.lockfree.updater import LockFreeUpdater
from optim.scaling.loss_scale import LossScale, Scaling
from optim.unit import Slot, Unit
from pagemem.devices.accelerator import Accelerator
from pagemem.devices.arena import Arena
from pagemem.errors import OffloadError
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.ranks.collectives import Collectives
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.sources.source_transfers import SourceFiles
from pagemem.telemetry.events import EventSink
from pagemem.tier import Tier
from scheduler.execution.driver import Driver
from scheduler.execution.update_ops import Entered
from scheduler.planning.trace import Access, HostClock, OpKey

#: One that foretells the gradients, one that is recorded, and one that follows the plan, which first places everything
#: anew.
STEPS: Final = 3


class RehearsalError(OffloadError):
    """A model whose step cannot be performed on torch's meta device; says why."""


class _Rehearsed(Driver):
    """The engine's driver, which says whether updates inside of its ops are made on a device."""

    def __init__(self, cost: CostMode, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._cost = cost

    def enter(self, key: OpKey, name: str, accesses: Sequence[Access]) -> Entered:
        """As `Driver.enter`, which every op goes through where there is a device."""
        on_device = any(self.memories.of(access.tensor).tier is Tier.DEVICE for access in accesses)
        self._cost.updates_are_made(on_device=on_device)
        return super().enter(key, name, accesses)

    def end(self, held: Sequence[PagedTensor]) -> None:
        """As `Driver.end`."""
        super().end(held)
        self._cost.updates_are_made(on_device=False)


class _OutsideBytes:
    """Bytes of tensors that are not in pages: activations, gradients in flight, what ops leave.

    Attributes:
        peak_bytes: the most at once since `restart`.
    """

    def __init__(self) -> None:
        self._now_bytes = 0
        self.peak_bytes = 0

    def __call__(self, _holder: Holder, more_bytes: int) -> None:
        self._now_bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)

    def restart(self) -> None:
        """Look for the most from here on."""
        self.peak_bytes = self._now_bytes


class _SilentChannel(UnitChannel):
    """Notes when a unit's gradients are handed over, and drops them: what updates take is simulated.

    Attributes:
        handed_over: index of the op of the step before which that was last.
    """

    __slots__ = ("_driver", "handed_over")

    def __init__(self, unit: Unit, driver: Driver) -> None:
        super().__init__(unit)
        self._driver = driver
        self.handed_over = 0

    def put(self, sums: dict[Slot, GradientSum]) -> int:
        """Returns the bytes that are free: all."""
        self.handed_over = self._driver.position
        return sum(total.release() for total in sums.values())


class _AllFinite(Scaling):
    """Meta tensors have no values: every norm is taken for finite, and nothing is clipped."""

    def coefficient(self, total: Tensor) -> Tensor | None:
        """One."""
        return torch.ones(())


class _Parts(StoreParts):
    """The parts of the engine's page store without bytes, and with the clock of the rehearsal."""

    device: ClassVar[str] = "meta"
    made: Driver

    def __init__(self, config: Config, rates: Rates, cost: CostMode) -> None:
        super().__init__(config)
        self.rates = rates
        self._cost = cost
        self.channels: list[_SilentChannel] = []

    def collectives(self) -> Collectives | None:
        """Silent ones, where several ranks are to be planned."""
        n_ranks = self.rates.n_ranks
        if n_ranks == 1:
            return None
        check_shareable(self.config)
        return SilentRanks(n_ranks, shards_of(self.config.parallel, n_ranks))

    def accelerator(self) -> Accelerator:
        """None that copies anything."""
        return MetaDevice()

    def channel(self, unit: Unit) -> UnitChannel:
        """One that nobody takes from."""
        self.channels.append(_SilentChannel(unit, self.made))
        return self.channels[-1]

    def arena(self, n_frames: int, page_bytes: int) -> Arena:
        """Meta tensors."""
        return MetaArena(n_frames, page_bytes)

    def page_files(self, directories: Sequence[RunDirectory], page_bytes: int) -> PageFiles:
        """Files that move nothing."""
        return NoFiles(len(directories), page_bytes, self.config.ssd.max_request)

    def source_files(self, page_files: PageFiles) -> SourceFiles:
        """Files that nothing is read from."""
        return NoSources(page_files.reads)

    def driver(self, mover: Mover, sink: EventSink) -> Driver:
        """One that times ops by the cost of their kernels."""
        rates = self.rates
        self.made = _Rehearsed(self._cost, mover, sink, lambda: rates.ssd_beside, clock=self._clock())
        return self.made

    def connect(self, driver: Driver, mover: DeviceMover) -> None:
        """Likewise."""
        h2d = self.rates.h2d
        driver.add_device(mover, lambda: (h2d, h2d), self._clock())

    def add_worker(self, driver: Driver) -> None:
        """Ops are made one after the other; those that a worker makes are on its lane."""
        driver.updates.beside = self.worker_wanted

    def _clock(self) -> HostClock:
        return HostClock(lambda: self._cost.seconds)

    def scaling(self) -> Scaling:
        """Without a look at values."""
        asked = super().scaling()
        # With a loss scale nobody looks at a norm's value but `_AllFinite`.
        scale = LossScale(1.0, dynamic=False) if asked.needs_norm else None
        return _AllFinite(asked.clip_norm, scale)


class Rehearsal:
    """An engine that has performed `STEPS` steps without bytes, and has a plan. Made by `rehearsed`.

    Attributes:
        store, driver: of the engine.
        channels: of the units that lock-free mode's update thread has. rates: of page files and of copies up.
    """

    def __init__(self, engine: Engine, parts: _Parts, outside: _OutsideBytes) -> None:
        self.engine = engine
        self._outside, self._first_bytes = outside, 0
        self.config, self.model, self.store = engine.config, engine.model, engine.debug.store
        self.driver, self.channels, self.rates = parts.made, parts.channels, parts.rates

    @property
    def peak_gradient_bytes(self) -> int:
        """The most bytes of gradients outside the pages at any time; in lock-free mode at most."""
        updater = self.engine.debug.updater
        return updater.most_direct_bytes if isinstance(updater, LockFreeUpdater) else updater.peak_direct_bytes

    @property
    def tensor_bytes(self) -> int:
        """The most bytes of tensors outside the pages. From the second step on gradients of steps before may be on
        their way to the update thread, which are no tensors here."""
        updater = self.engine.debug.updater
        late_bytes = updater.most_late_bytes if isinstance(updater, LockFreeUpdater) else 0
        return max(self._first_bytes, self._outside.peak_bytes + late_bytes)

    def rehearse(self, rows: int, tokens: int, steps: int | None = None) -> None:
        """Perform the steps, by default as many as it takes to have plans; fewer leave none, but all tensors.

        Raises:
            RehearsalError: the model needs values, or leaves no plan.
            BudgetError: as in a real step.
        """
        self._perform(rows, tokens, STEPS if steps is None else steps)
        if steps is None:
            self._check_planned()
            choice = self.engine.debug.recompute_choice
            while choice is not None and choice.open and choice.decide():
                self._perform(rows, tokens, STEPS)
                self._check_planned()

    def _perform(self, rows: int, tokens: int, steps: int) -> None:
        x = torch.empty((rows, tokens), dtype=torch.int64)
        self._outside.restart()
        for number in range(steps):
            if number == 1:
                self._first_bytes = self._outside.peak_bytes
                self._outside.restart()
            try:
                for _ in range(self.config.update.accumulation):
                    self.engine.scaled(self.model(x, x) / self.config.update.accumulation).backward()  # type: ignore[no-untyped-call]
            except OffloadError:
                raise
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                # What torch raises where a model's code asks a meta tensor for values: it depends on the op.
                reason = (str(error) or type(error).__name__).partition("\n")[0]
                raise RehearsalError(
                    f"the model's step cannot be performed without values, on torch's meta device: {reason}"
                ) from error
            self.engine.optimizer.step()
            self.engine.optimizer.zero_grad()
        self.driver.quiesce()

    def _check_planned(self) -> None:
        if self.driver.follower.plan is None:
            raise RehearsalError(
                "views of parameters in use leave no room to plan in, so every step would be fetched on demand; raise "
                "memory.ram"
            )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection inside, which would go through all units and pages again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def rehearsed(
    make_model: Callable[[], nn.Module], config: Config, cost: CostMode, rates: Rates, optimizer: OptimizerLike = None
) -> Iterator[Rehearsal]:
    """An engine without bytes for the model of a factory, built as `deferred_init` builds it; closed at the end.

    Args:
        cost: what kernels take.
        rates: of the page files, and of copies to the device.
        optimizer: as for `offload.Engine`.

    Raises:
        BudgetError, ConfigError, ValueError: as `offload.Engine`.
    """
    with tempfile.TemporaryDirectory(prefix="offload-plan-") as folder:
        paths = [str(Path(folder) / str(number)) for number in range(len(config.ssd.paths))]
        elsewhere = config.model_copy(update={"ssd": config.ssd.model_copy(update={"paths": paths})})
        on_meta: AbstractContextManager[Any] = torch.device("meta")
        outside = _OutsideBytes()
        with _no_collection(), on_meta, AttentionOfCpu(), RowsOfOneSequence(), LiveStorages(outside), cost:
            parts = _Parts(elsewhere, rates, cost)
            with built_into(lambda: PageStore(elsewhere, parts)):
                model = make_model()
            with Engine(model, elsewhere, optimizer) as engine:
                if parts.made.planner.ranks is not None:
                    parts.made.planner.ranks.link_bytes_per_s = rates.comm
                yield Rehearsal(engine, parts, outside)
