"""What a run shows while it trains: a live line on a terminal, one plain line every few steps in a pipe, and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from offload.live_bar import LiveBar
from pagemem.raw_file import sync_folder
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
        speed = f"{self.samples_per_s:,.1f} samples/s" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s"
        return (
            f"step {self.step}/{steps}  loss {self.loss:.4f}  {speed}  RAM {format_bytes(self.host_bytes)}  "
            f"SSD {format_bytes(self.ssd_bytes)}  {self.ssd_mb_per_s:,.0f} MB/s  waiting {self.wait_share:.1%}"
            + (f"  staleness {self.staleness}" if self.staleness else "")
        )


class ProgressLog:
    """Takes every step's metrics: to metrics.jsonl, flushed line by line, and to whoever watches.

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
        self._file: IO[bytes] | None = None
        self._bar = LiveBar(
            console, TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> ProgressLog:
        # Replaced in one step: a run that is killed here must not have lost the metrics of its beginning.
        draft = self._path.with_name(self._path.name + ".new")
        draft.unlink(missing_ok=True)
        with open(draft, "xb") as file:
            file.writelines(map(_line, self._earlier))
            file.flush()
            os.fsync(file.fileno())
        self._file = open(draft, "ab", buffering=0)  # By its new name from here on: nobody can put another file in its place.
        draft.replace(self._path)
        sync_folder(self._path.parent)
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if self._file is not None:
            try:
                self.sync()
            finally:
                self._file.close()

    def sync(self) -> None:
        """Make the metrics so far durable.

        Raises:
            OSError: the disk failed.
        """
        assert self._file is not None
        os.fsync(self._file.fileno())

    def take(self, metrics: StepMetrics) -> None:
        """One step is done.

        Raises:
            OSError: its line cannot be written whole; none of it is in the file.
        """
        assert self._file is not None
        line, at = _line(metrics), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._file.fileno(), at)
            raise
        if self._console.is_terminal:
            text = metrics.line(self._steps).split("  ", 1)[1]
            self._bar.move(self._task, completed=metrics.step, description=text)
        elif metrics.step % self._log_every == 0 or metrics.step == self._steps:
            self._console.print(metrics.line(self._steps), soft_wrap=True, highlight=False)


def _line(metrics: StepMetrics) -> bytes:
    return (json.dumps(asdict(metrics)) + "\n").encode()
