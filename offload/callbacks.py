"""Callbacks of `offload launch`: what a run reports while it trains, and to whom.

The metrics files and the progress line are callbacks, and so is whatever ``output.callbacks`` names. All methods are
called on the training thread, between two steps, in the order of the list. An exception of one ends the run once the
steps made are committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from torch import nn

from offload.config import Config


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run that is about to make its first step in this process.

    Attributes:
        config: the resolved configuration.
        folder: ``output.run``, which exists; a callback may write files of its own there.
        step: optimizer steps made before, above 0 where the run continues from a commit.
        n_parameters: elements of all parameters.
        unit: of what losses are means over, such as "byte", where the data say so.
        model: what is trained; a callback may read it in its methods.
    """

    config: Config
    folder: Path
    step: int
    n_parameters: int
    unit: str | None
    model: nn.Module


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one optimizer step: a line of metrics.jsonl, a row of metrics.csv.

    Attributes:
        step: counted from 1.
        loss: mean training loss of the step's micro-batches as the model returns it: nats of a cross entropy, also
            where the console shows bits.
        lr: learning rate of the step, of the first parameter group.
        step_s: seconds from asking for the batch to having the loss.
        samples_per_s: rows per second.
        host_bytes, ssd_bytes: bytes in use after the step, in RAM pages and in page files.
        ssd_read_bytes, ssd_written_bytes: traffic of the page files during the step.
        wait_share: share of the step in which the training thread waited for pages.
        staleness: lock-free mode: most updates by which a parameter lags behind.
        tokens_per_s: where the data say how many tokens a sample has.
        validation_loss: mean loss of the validation batches after the step; None where it was not evaluated.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=1)]
    loss: float
    lr: float
    step_s: float
    samples_per_s: float
    host_bytes: int
    ssd_bytes: int
    ssd_read_bytes: int
    ssd_written_bytes: int
    wait_share: float
    staleness: int = 0
    tokens_per_s: float | None = None
    validation_loss: float | None = None

    @property
    def ssd_mb_per_s(self) -> float:
        """SSD traffic, both directions, 10^6 bytes/s."""
        return (self.ssd_read_bytes + self.ssd_written_bytes) / self.step_s / 1e6


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation on the validation batches.

    Attributes:
        step: optimizer steps made.
        loss: mean over the batches, as `StepMetrics.loss`.
        best: whether it is the lowest so far of those that ``train.evaluate_every`` asked for.
    """

    step: int
    loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class CommitBegun:
    """A commit that begins once all callbacks have returned: what belongs to its steps must be durable by then.

    Attributes:
        step: optimizer steps made.
        name: "best" with ``commit.keep_best``; None: an unnamed one.
    """

    step: int
    name: str | None


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The end of a run in this process; its commits are made.

    Attributes:
        step: optimizer steps made.
        error: what ended it early; None after the last step, Ctrl-C and SIGTERM.
    """

    step: int
    error: BaseException | None


class Callback:
    """What ``output.callbacks`` makes; derive from it, its methods do nothing."""

    def on_start(self, run: RunStarted) -> None:
        """Before the first step. `on_end` is called later where this returns."""

    def on_step(self, metrics: StepMetrics) -> None:
        """After each optimizer step, and its evaluation where there is one."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """After each evaluation: before training, every ``train.evaluate_every`` steps, and after training."""

    def on_commit(self, commit: CommitBegun) -> None:
        """Before each commit."""

    def on_end(self, end: RunEnded) -> None:
        """At the end, also after an error."""
