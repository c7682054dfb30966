"""What a run leaves to read and to look at: the closing table and the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from offload.memory import MemoryReport, Stats
from offload.progress import StepMetrics
from pagemem.units import format_bytes

BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Everything the closing table shows. Losses are validation losses in bits per byte, None when not measured."""

    n_parameters: int
    steps: int
    train_s: float
    tokens: int
    before_bits: float | None
    after_bits: float | None
    unigram_bits: float | None
    stats: Stats
    memory: MemoryReport
    planned_step_s: float | None
    process_peak_bytes: int


def _bits(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def summary_rows(run: RunSummary) -> list[tuple[str, str]]:
    """The table as (what, value) pairs."""
    stats = run.stats
    rows = [
        ("parameters", f"{run.n_parameters:,}"),
        ("steps", f"{run.steps} ({stats.planned_steps} by plan, {stats.deviations} deviations)"),
        ("validation before, bits per byte", _bits(run.before_bits)),
        ("validation after, bits per byte", _bits(run.after_bits)),
        ("unigram entropy of the validation text, bits per byte", _bits(run.unigram_bits)),
        ("tokens/s", f"{run.tokens / run.train_s:,.0f}" if run.train_s else "-"),
        ("waiting for pages", f"{stats.wait_s / run.train_s:.1%} of the time" if run.train_s else "-"),
    ]
    if stats.dropped_steps or stats.dropped_gradients:
        rows.append(("dropped, not finite", f"{stats.dropped_steps} steps, {stats.dropped_gradients} gradients of units"))
    if stats.recomputed_blocks:
        rows.append(("recomputed in the backward pass", f"{stats.recomputed_blocks} of the blocks of the model"))
    if stats.device_units:
        rows.append(("updated on the device, where their states are", f"{stats.device_units} units"))
    if run.planned_step_s is not None and run.steps:
        rows.append(("step, mean against planned", f"{run.train_s / run.steps:.3f} s, {run.planned_step_s:.3f} s"))
    for name, tier in run.memory.tiers.items():
        budget = "no limit" if tier.budget_bytes is None else format_bytes(tier.budget_bytes)
        rows.append((f"{name} peak of budget", f"{format_bytes(tier.peak_bytes)} of {budget}"))
        planned = "no plan" if tier.planned_peak_pages is None else f"{tier.planned_peak_pages} planned"
        if tier.planned_with_commits and tier.planned_peak_pages is not None:
            planned = f"at most {planned}, with the commits that are kept"
        rows.append((f"{name} pages touched", f"{tier.peak_pages} of {format_bytes(run.memory.page_bytes)}, {planned}"))
    if run.steps:
        for what, n_bytes in (("read", stats.bytes_read), ("written", stats.bytes_written)):
            a_step = n_bytes / run.steps
            rows.append((f"SSD bytes {what} a step", f"{format_bytes(a_step)} ({a_step / run.n_parameters:.1f} a parameter)"))
    rows.append(("process peak (VmHWM), activations and interpreter included", format_bytes(run.process_peak_bytes)))
    return rows


def print_summary(run: RunSummary, console: Console) -> None:
    """The closing table."""
    print_rows("Run", summary_rows(run), console)


def print_rows(title: str, rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Rows of (what, value): framed on a terminal, aligned plain text in a pipe."""
    if not console.is_terminal:
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            console.print(f"{what:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(title=title, show_header=False)
    for what, value in rows:
        table.add_row(what, value)
    console.print(table)


def save_loss_curve(path: Path, metrics: Sequence[StepMetrics], run: RunSummary) -> None:
    """A picture of training and validation loss in bits per byte, with the unigram entropy as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([m.step for m in metrics], [m.loss * BITS_PER_NAT for m in metrics], linewidth=1, label="training")
    measured = [(s, b) for s, b in ((0, run.before_bits), (run.steps, run.after_bits)) if b is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", color="tab:red", label="validation")
    if run.unigram_bits is not None:
        axes.axhline(run.unigram_bits, color="gray", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None), title=f"{run.n_parameters / 1e6:.1f}M parameters")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
