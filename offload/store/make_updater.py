"""Makes the updater that a configuration asks for, and divides the RAM budget between it and the schedule.

Exact mode: gradients in flight, those on their way down from a device, and buffers for files that are read in place
| arena.
Lock-free mode: see `offload.budget.lock_free`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from offload.budget.lock_free import LockFreeBudget, UnitSize
from offload.store.masters import add_masters
from offload.store.page_store import PageStore
from optim.exact.updater import ExactUpdater, is_eager
from optim.gradient_budget import GradientBudget
from optim.gradient_downloads import GradientDownloadQueue
from optim.lockfree.late_round import round_of
from optim.lockfree.limits import GradientBudgets, StalenessBound
from optim.lockfree.update_thread import UpdateThread
from optim.lockfree.updater import LockFreeUpdater
from optim.rules import UpdateRule
from optim.scaling.loss_scale import Scaling
from optim.states import StateAccess
from optim.training import OtherGradients, Training
from optim.unit import Hyper, Unit
from optim.updater import Updater
from pagemem.budget import Budget
from pagemem.errors import BudgetError
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tier
from pagemem.units import ceil_div, format_bytes
from scheduler.planning.trace import Access, AccessMode, OpKind

#: Part of the budget that buffers for files that are read in place may take: 8 MiB of 512 MiB, eight reads of 1 MiB.
_BUFFER_PART: Final = 64
#: Part of the budget that gradients waiting for a worker take where not all states fit in RAM: 256 MiB of 8 GiB.
_BACKLOG_PART: Final = 32

Hypers = Callable[[], Sequence[Hyper]]


def make_updater(
    store: PageStore, rule: UpdateRule, hypers: Hypers, scaling: Scaling, other_gradients: Callable[..., OtherGradients]
) -> Updater:
    """The updater of ``store.config.update``; the arena gets its final size.

    Args:
        scaling: of the gradients.
        other_gradients: asked with ``keeps_unoptimized``, whether the updater keeps gradients that are not optimized:
            what gives the gradients that it does not keep.

    Raises:
        BudgetError: the budget cannot hold what the mode needs; names the smallest that can.
    """
    update = store.config.update
    exact = not update.lock_free
    others = other_gradients(keeps_unoptimized=(ExactUpdater if exact else LockFreeUpdater).keeps_unoptimized)
    eager = is_eager(scaling, update.start)
    blocks = update.norm == "blocks" or store.collectives is not None
    training = Training(
        store.driver, store.index, hypers, others, scaling, eager, store.counters, store.collectives, blocks
    )
    return _make_exact(store, rule, training) if exact else _make_lock_free(store, rule, training)


def _make_exact(store: PageStore, rule: UpdateRule, training: Training) -> Updater:
    device = store.accelerator
    # The largest gradient once as autograd made it, and once on its way down from a device.
    backlog = training.eager and store.parts.worker_wanted
    direct_bytes, on_their_way_bytes = divide_exactly(
        store, direct=training.eager and store.collectives is None, on_their_way=device is not None, backlog=backlog
    )
    # Of a device with memory of its own, gradients that are kept are in the buffer that they came down into, reserved
    # as a whole.
    budget = Budget(Tier.HOST, direct_bytes) if device is not None and device.stages_gradients else store.budget
    gradients = GradientBudget(budget, direct_bytes)
    downloads = None
    if device is not None:
        finish_update = store.driver.updates.finish_oldest
        downloads = GradientDownloadQueue(device, store.budget, on_their_way_bytes, direct_bytes, finish_update)
    store.parts.add_worker(store.driver)
    return ExactUpdater(training, rule, gradients, store.updated, downloads, store.parts.spill_folder)


def divide_exactly(
    store: PageStore, *, direct: bool, on_their_way: bool = False, backlog: bool = False
) -> tuple[int, int]:
    """Once all units are known: cut the gradients outside the arena, and buffers for files that are read in place, out
    of its share of the budget. Without room for the latter such reads stay as short as a page.

    Args:
        direct: whether gradients are ever used as autograd made them.
        on_their_way: whether some are on their way down from a device.
        backlog: whether some wait for a worker that makes updates.

    Returns:
        Bytes for gradients in use, and for gradients on their way: as many as the largest unit has, or 0 where
        there is no room for that. With a ``backlog`` there are more of those in use, see `_backlog_bytes`.

    Raises:
        BudgetError: the run's commits were made with a larger budget, and this one cannot go on from them.
    """
    need_frames, ram_bytes = max(_update_frames(store, unit) for unit in store.index.units), store.config.memory.ram
    if need_frames > ram_bytes // store.page_bytes:
        if not store.earlier.whole:
            raise AssertionError(f"an update needs {need_frames} pages, which the check of the budget has not seen")
        smallest_bytes = need_frames * store.page_bytes
        raise BudgetError(
            f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), but the commits in "
            f"{store.earlier.folder.path} were made with more, and their optimizer states are cut accordingly: "
            f"going on from them needs at least {smallest_bytes} bytes ({format_bytes(smallest_bytes)})",
            smallest_bytes,
        )
    largest_bytes, left_bytes = max(unit.gradient_bytes for unit in store.index.units), ram_bytes
    given_bytes: list[int] = []
    for wanted in (direct, on_their_way):
        fits = wanted and (left_bytes - largest_bytes) // store.page_bytes >= need_frames
        given_bytes.append(largest_bytes if fits else 0)
        left_bytes -= given_bytes[-1]
    if backlog and given_bytes[0]:
        more_bytes = _backlog_bytes(store, left_bytes, need_frames)
        given_bytes[0], left_bytes = given_bytes[0] + more_bytes, left_bytes - more_bytes
    buffer_bytes = store.sources.larger_buffers(ram_bytes // _BUFFER_PART)
    if (left_bytes - buffer_bytes) // store.page_bytes < need_frames:
        buffer_bytes = 0
    store.resize_arena((left_bytes - buffer_bytes) // store.page_bytes)
    if buffer_bytes:
        store.sources.enlarge_buffers(buffer_bytes)
    return given_bytes[0], given_bytes[1]


def _backlog_bytes(store: PageStore, left_bytes: int, need_frames: int) -> int:
    """Room for gradients that wait for a worker: of all units that are updated in host memory where pages for all
    states are left beside it, else a small part of the budget."""
    units = [unit for unit in store.index.units if not unit.device_resident]
    all_bytes = sum(unit.gradient_bytes for unit in units)
    frames = sum(tensor.n_frames for unit in units for tensor in _lasting(unit))
    spare_bytes = left_bytes - max(frames, need_frames) * store.page_bytes
    small_bytes = min(store.config.memory.ram // _BACKLOG_PART, left_bytes - need_frames * store.page_bytes)
    return max(0, min(all_bytes, max(spare_bytes, small_bytes)))


def _lasting(unit: Unit) -> list[PagedTensor]:
    """What a unit has from step to step."""
    states = (tensor for part in unit.slices for tensor in (part.states, part.master))
    return [unit.parameters, *(tensor for tensor in states if tensor is not None)]


def _update_frames(store: PageStore, unit: Unit) -> int:
    """Pages that a unit's update needs at once, or with other ranks its use, or the sum of its gradients."""
    parts = [sum(t.n_frames for t in (part.states, part.master) if t is not None) for part in unit.slices]
    if unit.sharing is not None:
        whole, own = (
            ceil_div(n_bytes, store.page_bytes)
            for n_bytes in (unit.sharing.layout.n_bytes, unit.sharing.layout.shard_bytes)
        )
        kept = unit.parameters.n_frames
        return max(kept + whole, (whole + own) * unit.trained, kept + own + max(parts))
    gradients = unit.parameters.n_frames if unit.trained else 0
    return unit.parameters.n_frames + gradients + max(parts)


def _size_of(unit: Unit) -> UnitSize:
    slices = [part.numel for part in unit.slices] if unit.trained else []
    return UnitSize(unit.dtype, unit.numel, unit.gradient_bytes, slices)


def _make_lock_free(store: PageStore, rule: UpdateRule, training: Training) -> Updater:
    update = store.config.update
    sizes = [_size_of(unit) for unit in store.index.units]
    lock_free = LockFreeBudget(
        sizes, len(rule.state_names), store.page_bytes, update.threads, may_be_on_time=update.on_time == "auto"
    )
    division = lock_free.divide(store.config.memory.ram, eager=training.eager)
    late = [
        unit for place, unit in enumerate(store.index.units) if unit.trained and place not in division.on_time
    ]  # fmt: skip
    if not division.resident:
        for unit in late:
            if unit.slices[0].master is None:
                add_masters(store.mover, store.driver, unit)
    store.resize_arena(division.parameter_frames + division.state_frames)
    first_frame = store.mover.tenants.set_aside(division.state_frames)
    if division.resident:
        for unit in store.index.units:
            with store.driver.untraced():
                key = (OpKind.FORWARD, ("fix", unit.index))
                with store.driver.op(key, unit.name, [Access(unit.parameters.id, AccessMode.READ)]):
                    unit.parameters.resident = True
    channels = [store.parts.channel(unit) for unit in late]
    # Gradients that are handed over as they are complete come from the last unit first.
    in_turn = channels[::-1] if training.eager else channels
    late_round = round_of(
        [channel.unit for channel in in_turn], first_frame, division.state_frames, update.max_staleness
    )
    follower = store.driver.planner.follow_updates(late_round)
    thread = UpdateThread(store.mover, rule, in_turn, follower, store.counters, n_threads=update.threads)
    budgets = GradientBudgets(
        GradientBudget(store.budget, division.gradient_bytes, lock_free.scratch_bytes),
        GradientBudget(store.budget, division.direct_bytes),
    )
    bound = StalenessBound(update.max_staleness, update.exact_steps, adopts_after=update.start == "auto")
    states = StateAccess(store.driver, rule.state_names)
    return LockFreeUpdater(training, rule, thread, channels, states, budgets, bound, store.updated)
