"""What a run shows while it trains: a live line on a terminal, one plain line every few steps in a pipe, and
metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from offload.console.live_bar import LiveBar
from pagemem.errors import StorageError
from pagemem.folders.own_file import naming, open_file, replace_file, write_all
from pagemem.units import format_bytes


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step's figures: loss in nats, bytes over all tiers, and the share of the step spent waiting for pages.

    Attributes:
        tokens_per_s: where the data say how many tokens a sample has.
    """

    step: int
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

    @property
    def ssd_mb_per_s(self) -> float:
        """SSD traffic, both directions, 10^6 bytes/s."""
        return (self.ssd_read_bytes + self.ssd_written_bytes) / self.step_s / 1e6

    def line(self, steps: int) -> str:
        """The plain line."""
        speed = (
            f"{self.samples_per_s:,.1f} samples/s"
            if self.tokens_per_s is None
            else f"{self.tokens_per_s:,.0f} tokens/s"
        )
        return (
            f"step {self.step}/{steps}  loss {self.loss:.4f}  {speed}  RAM {format_bytes(self.host_bytes)}  "
            f"SSD {format_bytes(self.ssd_bytes)}  {self.ssd_mb_per_s:,.0f} MB/s  waiting {self.wait_share:.1%}"
            + (f"  staleness {self.staleness}" if self.staleness else "")
        )


class ProgressLog:
    """Takes every step's metrics: to metrics.jsonl, written line by line, and to whoever watches.

    Args:
        path: the metrics file; replaced.
        steps: steps in all.
        log_every: steps between two plain lines.
        earlier: metrics of the steps before, with which the file begins.
    """

    def __init__(
        self, path: Path, console: Console, steps: int, log_every: int, earlier: Sequence[StepMetrics] = ()
    ) -> None:
        self._earlier = list(earlier)
        self._path = path
        self._console = console
        self._steps = steps
        self._log_every = log_every
        self._fd: int | None = None
        self._end_bytes = 0
        self._bar = LiveBar(
            console,
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> ProgressLog:
        # Replaced in one step: a run that is killed here must not have lost the metrics of its beginning.
        lines = b"".join(map(_line, self._earlier))
        replace_file(self._path, lines)
        with naming("opening", self._path):
            self._fd = open_file(self._path, os.O_WRONLY)
        self._end_bytes = len(lines)
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if self._fd is not None:
            try:
                self.sync()
            finally:
                fd, self._fd = self._fd, None
                os.close(fd)

    def sync(self) -> None:
        """Make the metrics so far durable.

        Raises:
            StorageError: the disk failed.
        """
        assert self._fd is not None
        with naming("syncing", self._path):
            os.fsync(self._fd)

    def take(self, metrics: StepMetrics) -> None:
        """One step is done.

        Raises:
            StorageError: its line cannot be written whole; none of it is in the file.
        """
        assert self._fd is not None
        line = _line(metrics)
        try:
            write_all(self._fd, line, self._path, self._end_bytes)
        except StorageError:
            with suppress(OSError):  # what failed first is what to raise
                os.ftruncate(self._fd, self._end_bytes)
            raise
        self._end_bytes += len(line)
        if self._console.is_terminal:
            text = metrics.line(self._steps).split("  ", 1)[1]
            self._bar.move(self._task, completed=metrics.step, description=text)
        elif metrics.step % self._log_every == 0 or metrics.step == self._steps:
            self._console.print(metrics.line(self._steps), soft_wrap=True, highlight=False)


def _line(metrics: StepMetrics) -> bytes:
    return (json.dumps(asdict(metrics)) + "\n").encode()
