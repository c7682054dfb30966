"""The table that closes a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.profiling.stats import MemoryReport, Stats
from pagemem.units import format_bytes

BITS_PER_NAT = 1 / math.log(2)


def measure_of(unit: str | None) -> str:
    """What losses are shown in, by ``unit`` of the data."""
    return "nats" if unit is None else f"bits per {unit}"


def in_measure(nats: float, unit: str | None) -> float:
    """A loss in what `measure_of` names."""
    return nats if unit is None else nats * BITS_PER_NAT


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Everything the closing table shows. Losses are validation losses, None when not measured.

    Attributes:
        steps: made by now, also in earlier launches of the run.
        made: steps of this launch, of which ``train_s``, ``samples``, ``stats`` and ``rank_wait_s`` are.
        rank_wait_s: seconds that this rank has waited for others between gathers and sums, which `stats` have.
        tokens_per_sample, unit: as the data say, see `offload.launch.batches`.
    """

    n_parameters: int
    steps: int
    made: int
    train_s: float
    samples: int
    tokens_per_sample: int | None
    before_nats: float | None
    after_nats: float | None
    unit: str | None
    unigram_bits: float | None
    stats: Stats
    memory: MemoryReport
    planned_step_s: float | None
    process_peak_bytes: int
    page_files_bytes: int
    rank_wait_s: float = 0.0

    @property
    def measure(self) -> str:
        """What losses are shown in."""
        return measure_of(self.unit)

    def shown(self, nats: float) -> float:
        """A loss in `measure`."""
        return in_measure(nats, self.unit)

    @property
    def speed(self) -> tuple[str, str]:
        """Throughput: what is counted, and how many a second."""
        what, n = (
            ("samples/s", self.samples)
            if self.tokens_per_sample is None
            else ("tokens/s", self.samples * self.tokens_per_sample)
        )
        return what, f"{n / self.train_s:,.{1 if self.tokens_per_sample is None else 0}f}" if self.train_s else "-"


def process_peak_bytes() -> int:
    """The most RAM that this process has had (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _loss(run: RunSummary, nats: float | None) -> str:
    return "not measured" if nats is None else f"{run.shown(nats):.3f}"


def _steps(run: RunSummary) -> str:
    how = f"({run.stats.planned_steps} by plan, {run.stats.deviations} deviations)"
    return f"{run.steps} {how}" if run.made == run.steps else f"{run.steps}, {run.made} of them in this launch {how}"


@dataclass(frozen=True, slots=True)
class RankUse:
    """What one of several ranks has had and waited for.

    Attributes:
        peak_bytes: of its process. page_wait_s, rank_wait_s: seconds that its training thread waited in ops, for pages
            or for what other ranks send, and between them.
    """

    peak_bytes: int
    page_wait_s: float
    rank_wait_s: float


def summary_rows(run: RunSummary, uses: Sequence[RankUse] = ()) -> list[tuple[str, str]]:
    """The table as (what, value) pairs; with several ranks it is the first one's.

    Args:
        uses: of each rank, in order.
    """
    stats = run.stats
    rows = [
        ("parameters", f"{run.n_parameters:,}"),
        ("steps", _steps(run)),
        (f"validation before, {run.measure}", _loss(run, run.before_nats)),
        (f"validation after, {run.measure}", _loss(run, run.after_nats)),
    ]
    if run.unigram_bits is not None:
        unigram = run.shown(run.unigram_bits / BITS_PER_NAT)
        rows.append((f"unigram entropy of the validation text, {run.measure}", f"{unigram:.3f}"))
    rows += [run.speed, *_wait_rows(run, uses)]
    if stats.dropped_steps or stats.dropped_gradients:
        rows.append(
            ("dropped, not finite", f"{stats.dropped_steps} steps, {stats.dropped_gradients} gradients of units")
        )
    if stats.recomputed_blocks:
        rows.append(("recomputed in the backward pass", f"{stats.recomputed_blocks} of the blocks of the model"))
    if stats.device_units:
        rows.append(("updated on the device, where their states are", f"{stats.device_units} units"))
    if run.planned_step_s is not None and run.made:
        rows.append(("step, mean against planned", f"{run.train_s / run.made:.3f} s, {run.planned_step_s:.3f} s"))
    for name, tier in run.memory.tiers.items():
        budget = "no limit" if tier.budget_bytes is None else format_bytes(tier.budget_bytes)
        rows.append((f"{name} peak of budget", f"{format_bytes(tier.peak_bytes)} of {budget}"))
        planned = "no plan" if tier.planned_peak_pages is None else f"{tier.planned_peak_pages} planned"
        if tier.planned_with_commits and tier.planned_peak_pages is not None:
            planned = f"at most {planned}, with the commits that are kept"
        rows.append((f"{name} pages touched", f"{tier.peak_pages} of {format_bytes(run.memory.page_bytes)}, {planned}"))
    kept = run.memory.tiers["ssd"].planned_with_commits
    room = ", with room for the versions that commits keep" if kept else ""
    rows.append(("page files on disk", f"{format_bytes(run.page_files_bytes)}{room}"))
    if run.made:
        for what, n_bytes in (("read", stats.bytes_read), ("written", stats.bytes_written)):
            a_step = n_bytes / run.made
            rows.append(
                (f"SSD bytes {what} a step", f"{format_bytes(a_step)} ({a_step / run.n_parameters:.1f} a parameter)")
            )
    peaks = ", ".join(format_bytes(use.peak_bytes) for use in uses) or format_bytes(run.process_peak_bytes)
    rows.append((f"process peak{_of_ranks(uses)} (VmHWM), activations and interpreter included", peaks))
    return rows


def _wait_rows(run: RunSummary, uses: Sequence[RankUse]) -> list[tuple[str, str]]:
    def shares(waits_s: Sequence[float]) -> str:
        return ", ".join(f"{wait_s / run.train_s:.1%}" for wait_s in waits_s) + " of the time" if run.train_s else "-"

    if len(uses) < 2:
        return [("waiting for pages", shares([run.stats.wait_s]))]
    return [
        (f"waiting for pages and sums{_of_ranks(uses)}", shares([use.page_wait_s for use in uses])),
        (f"waiting for other ranks between steps{_of_ranks(uses)}", shares([use.rank_wait_s for use in uses])),
    ]


def _of_ranks(uses: Sequence[RankUse]) -> str:
    return f" of ranks 0 to {len(uses) - 1}" if len(uses) > 1 else ""
