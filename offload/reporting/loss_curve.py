"""loss_curve.png: training loss, smoothed, and validation loss of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from offload.callbacks import StepMetrics
from offload.reporting.summary import RunSummary
from pagemem.folders.own_file import replace_file

#: Part of the steps on either side over which the training loss is averaged.
_SMOOTHED_SHARE: Final = 0.02
_TRAINING, _VALIDATION, _NEUTRAL = "#1f6fb4", "#d1495b", "#6b7280"


def smoothed(losses: Sequence[float]) -> list[float]:
    """Centred moving average of the losses; towards both ends it is over fewer of them."""
    sums, n = np.cumsum([0.0, *losses]), len(losses)
    at = np.arange(n)
    width = np.minimum(int(_SMOOTHED_SHARE * n), np.minimum(at, n - 1 - at))
    return [float(mean) for mean in (sums[at + width + 1] - sums[at - width]) / (2 * width + 1)]


def save_loss_curve(path: Path, metrics: Sequence[StepMetrics], run: RunSummary, title: str) -> None:
    """Draw the curve, in bits where the data have a unit, otherwise in nats.

    Args:
        metrics: of all steps that have any.
        title: names the run and its model.

    Raises:
        StorageError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw(axes, metrics, run)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel="optimizer step", ylabel=f"loss ({run.measure})", xlim=(0, max(1, run.steps)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(path, picture.getvalue())


def _draw(axes: Any, metrics: Sequence[StepMetrics], run: RunSummary) -> None:
    steps, losses = [m.step for m in metrics], [run.shown(m.loss) for m in metrics]
    averaged = len(losses) * _SMOOTHED_SHARE >= 1
    if averaged:
        axes.plot(steps, losses, color=_TRAINING, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(
        steps, smoothed(losses), color=_TRAINING, linewidth=1.8, label="training" + (", averaged" if averaged else "")
    )
    nats = {0: run.before_nats, **{m.step: m.validation_loss for m in metrics}}
    if run.after_nats is not None:
        nats[run.steps] = run.after_nats
    points = sorted((step, run.shown(loss)) for step, loss in nats.items() if loss is not None)
    if points:
        # Lines only between evaluations during training: a straight line from first to last would be no measurement.
        style = "o-" if len(points) > 2 else "o"
        options = {"color": _VALIDATION, "markersize": 4, "linewidth": 1, "clip_on": False, "zorder": 3}
        axes.plot(*zip(*points, strict=True), style, label=f"validation, last {points[-1][1]:.3f}", **options)
    if run.unigram_bits is not None and run.unit is not None:
        label = f"best model without context, {run.unigram_bits:.3f}"
        axes.axhline(run.unigram_bits, color=_NEUTRAL, linestyle="--", linewidth=1, label=label)
