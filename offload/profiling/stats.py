"""What the engine says of itself: counters since the start, and bytes per tier against budget and plan."""

from __future__ import annotations

from dataclasses import dataclass

from offload.activations.policy import RecomputeChoice
from offload.checkpoint.committer import Committer
from offload.store.page_store import PageStore
from optim.updater import Updater
from pagemem.residency.host_mover import HostMover
from pagemem.telemetry.events import EventKind
from pagemem.tier import TRANSIENT, Tier


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine was made; they only grow.

    Attributes:
        steps: optimizer steps; each was a planned or an on-demand one.
        bytes_read, bytes_written: moved by the page files.
        wait_s: the training thread's waits for page moves.
        update_s: spent in update kernels, on whichever thread.
        planned_steps: steps that followed a plan, wholly or but for what differed. deviations: those of them that
            differed from every plan, in an op or because something was not brought in time.
        on_demand_bytes: of tensors that ops had to fetch themselves, since no plan had brought them.
        planned_passes: forward passes that evaluated by a plan of their own.
        dropped_steps: steps whose gradients were not finite and were not applied (loss scaling, or clipping in
            lock-free mode).
        dropped_gradients: gradients of single units that were not finite and were not applied (lock-free mode).
        recomputed_blocks: blocks of the model that are recomputed in the backward pass now; not a counter.
        device_units: device-resident units, which are updated there; not a counter.
    """

    steps: int
    planned_steps: int
    on_demand_steps: int
    deviations: int
    bytes_read: int
    bytes_written: int
    wait_s: float
    update_s: float
    dropped_steps: int = 0
    dropped_gradients: int = 0
    recomputed_blocks: int = 0
    device_units: int = 0
    on_demand_bytes: int = 0
    planned_passes: int = 0

    def since(self, earlier: Stats) -> Stats:
        """What has been added since ``earlier``."""
        added = {name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__}
        return Stats(**{**added, "recomputed_blocks": self.recomputed_blocks, "device_units": self.device_units})


def stats_of(store: PageStore, updater: Updater, choice: RecomputeChoice | None) -> Stats:
    """The counters of a running engine."""
    driver, counters, files = store.driver, store.counters, store.page_files
    return Stats(
        steps=driver.follower.planned_steps + driver.on_demand_steps,
        planned_steps=driver.follower.planned_steps,
        on_demand_steps=driver.on_demand_steps,
        deviations=driver.follower.deviations,
        bytes_read=files.reads.n_bytes,
        bytes_written=files.writes.n_bytes,
        wait_s=counters.seconds[EventKind.WAIT],
        update_s=counters.seconds[EventKind.UPDATE],
        dropped_steps=updater.dropped_steps,
        dropped_gradients=updater.dropped_gradients,
        recomputed_blocks=0 if choice is None else choice.blocks.n_recomputed,
        device_units=sum(unit.device_resident for unit in store.index.units),
        on_demand_bytes=driver.memories.on_demand_bytes,
        planned_passes=driver.tracks.passes.follower.planned_steps,
    )


def planned_step_s(store: PageStore) -> float | None:
    """Seconds of a step as the plan predicts them; None while there is none."""
    plan = store.driver.follower.plan
    return None if plan is None else plan.step_s


@dataclass(frozen=True, slots=True)
class TierUse:
    """Bytes of one tier.

    Attributes:
        budget_bytes: limit, or None for a tier that grows with the model (SSD).
        used_bytes: held now.
        peak_bytes: the most that was held at once, whole pages and gradients in flight.
        peak_pages: distinct pages touched, since the plan took over if there is one.
        planned_peak_pages: ``peak_pages`` as the plan predicts it, or None without a plan.
        planned_with_commits: the prediction is an upper bound, because commits keep the pages that they name.
    """

    budget_bytes: int | None
    used_bytes: int
    peak_bytes: int
    peak_pages: int
    planned_peak_pages: int | None
    planned_with_commits: bool = False


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Use of every tier ("device" where there is one, "host", "ssd"), host bytes by tag, and the page size.

    Attributes:
        updates: the mode of updates; where ``update.mode`` is "auto", with both forecasts or what else chose it.
    """

    tiers: dict[str, TierUse]
    by_tag: dict[str, int]
    page_bytes: int
    updates: str = "exact"


def commit_frames(mover: HostMover, n_kept: int) -> int:
    """The most page-file frames that commits may need, of which so many are kept, beside the newest copy of each
    tensor.

    One copy of another age for each of them, and for the one in the making.
    """
    return (n_kept + 1) * sum(tensor.n_frames for tensor in mover.tensors.values() if tensor.tag not in TRANSIENT)


def memory_report(store: PageStore, updater: Updater, committer: Committer) -> MemoryReport:
    """Bytes per tier of a running engine."""
    mover, page_bytes, plan = store.mover, store.page_bytes, store.driver.follower.plan
    commits = store.config.commit
    committing = bool(commits.every_steps or commits.every_s or committer.commits)
    host_planned = ssd_planned = None
    if plan is not None:
        host_planned = plan.peak_frames + updater.state_frames
        ssd_planned = mover.planned_page_file_frames(plan.stored())
        if committing:
            named = sum(1 for commit in committer.commits.values() if commit.manifest.name is not None)
            ssd_planned += commit_frames(mover, commits.keep + named)
    in_flight, peak_in_flight = updater.direct_bytes, updater.peak_direct_bytes
    host = TierUse(
        store.budget.limit_bytes,
        mover.host.used_frames * page_bytes + in_flight,
        mover.host.peak_frames * page_bytes + peak_in_flight,
        mover.tenants.touched_frames,
        host_planned,
    )
    ssd = TierUse(
        None,
        mover.ssd.used_frames * page_bytes,
        mover.ssd.peak_frames * page_bytes,
        mover.ssd.peak_frames,
        ssd_planned,
        committing,
    )
    return MemoryReport(
        {**_device_use(store), "host": host, "ssd": ssd},
        store.bytes_by_tag(in_flight),
        page_bytes,
        store.config.update.said,
    )


def _device_use(store: PageStore) -> dict[str, TierUse]:
    if (device := store.device_tier) is None:
        return {}
    plan, page_bytes, book = store.driver.follower.plan, store.page_bytes, device.mover.host
    use = TierUse(
        device.budget.limit_bytes,
        book.used_frames * page_bytes,
        book.peak_frames * page_bytes,
        device.mover.tenants.touched_frames,
        None if plan is None else plan.peaks[Tier.DEVICE],
    )
    return {"device": use}
