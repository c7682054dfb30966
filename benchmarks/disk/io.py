"""The page file against fio on the same file system: ``python -m benchmarks.disk.io [--dir D] [--seconds 0.7]``.

Reads and writes of 4 MiB with 1, 2 and 4 requests under way, checksums on and off, interleaved with fio's direct I/O
(libaio) of the same size and depth: how many requests are with the system at a time, for the page file its threads. The
ratio is the median over rounds of ours divided by fio's of the same round, so that a drift of the disk cancels;
measurements are short and many for the same reason. Like with like: all work on one and the same file of random bytes,
written before anything is measured, with buffers in huge pages. What is asked of the page file are routes made
beforehand, as the engine makes one a tensor and keeps it.

Without checksums the page file does what fio does, with as many buffers. With checksums it is kept busy as the engine
keeps it, with one transfer more begun than may be under way, so that one is verified while others are read. That takes
one buffer more, and where a processor copies what comes from the disk (a virtual one, a page cache) few buffers stay in
its cache and are faster. So a plain loop over preadv and pwritev is measured, too, with those buffers and as many
threads: what it loses to fio is not the page file's doing.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.disk.fio import Fio, Sample
from benchmarks.disk.plain_io import PlainLoop
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import Extent, FrameId
from pagemem.units import MiB

REQUEST_BYTES: Final = 4 * MiB
FILE_BYTES: Final = 512 * MiB
DEPTHS: Final = (1, 2, 4)
BAR: Final = 0.9
#: Contestants, in the order of the table's columns.
FIO, PLAIN, CHECKED, UNCHECKED = "fio", "plain loop", "checksums", "no checksums"

#: Measures "read" or "write" with so many requests under way for so many seconds.
Contestant = Callable[[str, int, float], Sample]


class PageFileRun:
    """Page files over `FILE_BYTES` of the directory's page file, and the memory they are read into and written from.

    Args:
        depth: how many requests may be with the system at a time.
        spare: transfers begun beyond that, to be verified meanwhile.
    """

    def __init__(
        self, directory: RunDirectory, checksums: bool, depth: int, spare: int = 1, limit_mb_per_s: float | None = None
    ) -> None:
        self.files = PageFiles(
            [directory],
            page_bytes=REQUEST_BYTES,
            checksums=checksums,
            threads_per_path=depth,
            limit_mb_per_s=limit_mb_per_s,
        )
        self.n_frames = FILE_BYTES // REQUEST_BYTES
        self._n_begun = depth + spare
        # One buffer a transfer begun.
        self._memory = mmap.mmap(-1, self._n_begun * REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # as the engine's arenas
        self.buffers = memoryview(self._memory)
        self.files.grow(self.n_frames)
        # Kept from transfer to transfer, as the engine keeps them.
        self._routes = [self.files.route([Extent(FrameId(i), 0, REQUEST_BYTES)]) for i in range(self.n_frames)]

    @property
    def path(self) -> Path:
        """The page file."""
        return Path(self.files.paths[0])

    def fill(self) -> None:
        """Write every frame once, so that it can be read."""
        self.refresh()
        self.drive("write", lambda n: n < self.n_frames)

    def take_over(self, other: PageFileRun) -> None:
        """Go by what the other wrote to the file."""
        for mine, others in zip(self._routes, other._routes, strict=True):
            self.files.remember(mine, other.files.sums(others))

    def refresh(self) -> None:
        """Fresh random bytes to write."""
        for start in range(0, len(self.buffers), REQUEST_BYTES):
            self.buffers[start : start + REQUEST_BYTES] = os.urandom(REQUEST_BYTES)

    def run(self, way: str, seconds: float) -> Sample:
        """Measure sequential transfers, as the engine has them."""
        if way == "write":
            self.refresh()
        end_s = time.perf_counter() + seconds
        return self.drive(way, lambda n: time.perf_counter() < end_s)

    def drive(self, way: str, more: Callable[[int], bool]) -> Sample:
        """Transfers one after another, each begun where one ends, while ``more`` accepts the next number."""
        begin = self.files.read if way == "read" else self.files.write
        numbers, lock, over = count(), threading.Lock(), threading.Event()
        errors: list[BaseException] = []
        moved_bytes, left = 0, self._n_begun

        def start(slot: int, number: int) -> None:
            buffer = self.buffers[slot * REQUEST_BYTES : (slot + 1) * REQUEST_BYTES]
            begin(self._routes[number % self.n_frames], buffer, lambda error: ended(slot, error))

        def ended(slot: int, error: BaseException | None) -> None:
            nonlocal moved_bytes, left
            with lock:
                moved_bytes += REQUEST_BYTES
                number = next(numbers)
                if error is not None:
                    errors.append(error)
                if errors or not more(number):
                    left -= 1
                    if left == 0:
                        over.set()
                    return
            start(slot, number)

        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for slot, number in enumerate([next(numbers) for _ in range(self._n_begun)]):
            start(slot, number)
        over.wait()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if errors:
            raise errors[0]
        return Sample(moved_bytes, wall_s, cpu_s)

    def close(self) -> None:
        """Give back threads, descriptors and memory."""
        self.files.close()
        self.buffers.release()
        self._memory.close()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a way and a depth, with one entry a contestant in each dict."""

    way: str
    depth: int
    gb_per_s: dict[str, Spread]
    cpu_s_per_gb: dict[str, float]
    ratio_to_fio: dict[str, Spread]

    @classmethod
    def of(cls, way: str, depth: int, samples: dict[str, list[Sample]]) -> Row:
        ours = [name for name in samples if name != FIO] if FIO in samples else []
        return cls(
            way,
            depth,
            {name: Spread.of([sample.gb_per_s for sample in found]) for name, found in samples.items()},
            {name: round(statistics.median(s.cpu_s_per_gb for s in found), 3) for name, found in samples.items()},
            {
                name: Spread.bootstrap(
                    [our.gb_per_s / fio.gb_per_s for our, fio in zip(samples[name], samples[FIO], strict=True)]
                )
                for name in ours
            },
        )

    def lines(self) -> list[tuple[str, str]]:
        """As text, one line a contestant."""
        lines = []
        for name, speed in self.gb_per_s.items():
            over = f", {self.ratio_to_fio[name]} of fio" if name in self.ratio_to_fio else ""
            cost = f"{self.cpu_s_per_gb[name]:.3f} processor s/GB"
            lines.append((f"{self.way}, depth {self.depth}, {name}", f"{speed} GB/s{over}; {cost}"))
        return lines


def measure(
    contestants: dict[str, Contestant],
    prepare: Callable[[], None],
    seconds: float,
    rounds: int,
) -> Iterator[Row]:
    """One row at a time; within each round all contestants, the first one changing from round to round."""
    names = list(contestants)
    for way in ("write", "read"):
        prepare()
        for depth in DEPTHS:
            samples: dict[str, list[Sample]] = {name: [] for name in names}
            for turn in range(rounds):
                for i in range(len(names)):
                    name = names[(turn + i) % len(names)]
                    samples[name].append(contestants[name](way, depth, seconds))
            yield Row.of(way, depth, samples)


def file_system(folder: Path) -> str:
    """What ``folder`` lies on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(around, key=lambda mount: len(mount[0]))[1]


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each way, depth and contestant beside fio."""
    return [
        common.ratio_row(
            f"GB/s, {name}, {row['way']}, depth {row['depth']} / fio", Spread(**ratio),
            pairs=record["settings"]["rounds"], steps_per_turn=1,
        )
        for row in record["rows"]
        for name, ratio in row["ratio_to_fio"].items()
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk.io", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=0.7, help="of each single measurement (default: 0.7)")
    parser.add_argument("--rounds", type=int, default=21, help="measurements of each figure (default: 21)")
    common.common_arguments(parser)
    return parser.parse_args(arguments)


def measure_all(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Every row, and what it was measured with."""
    with ExitStack() as stack:
        Path(options.dir).mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagemem-io-", dir=options.dir)))
        directory = stack.enter_context(RunDirectory(folder / "run"))
        runs: dict[tuple[str, int], PageFileRun] = {}
        for name, depth in product((CHECKED, UNCHECKED), DEPTHS):
            runs[name, depth] = PageFileRun(directory, name == CHECKED, depth, spare=int(name == CHECKED))
            stack.callback(runs[name, depth].close)
        writer = runs[CHECKED, max(DEPTHS)]

        def prepare() -> None:
            writer.fill()
            for run in runs.values():
                run.take_over(writer)

        rows: list[Row] = []
        for row in measure(_contestants(runs, stack), prepare, options.seconds, options.rounds):
            rows.append(row)
            print(f"measured {row.way}, depth {row.depth}", file=sys.stderr)
        return rows, {
            "request_bytes": REQUEST_BYTES,
            "file_bytes": FILE_BYTES,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "backend": writer.files.backend_name,
            "file_system": file_system(folder),
            "fio": Fio.version(),
        }


def _contestants(runs: Mapping[tuple[str, int], PageFileRun], stack: ExitStack) -> dict[str, Contestant]:
    writer = runs[CHECKED, max(DEPTHS)]
    direct = writer.files.backend_name == "direct"
    plain = {
        depth: PlainLoop(writer.path, FILE_BYTES, REQUEST_BYTES, runs[CHECKED, depth].buffers, direct=direct)
        for depth in DEPTHS
    }
    for loop in plain.values():
        stack.callback(loop.close)

    def contestant(name: str) -> Contestant:
        return lambda way, depth, seconds: runs[name, depth].run(way, seconds)

    fio = Fio(writer.path, FILE_BYTES, REQUEST_BYTES, direct=direct)
    return {
        **({FIO: fio.run} if Fio.version() is not None else {}),
        PLAIN: lambda way, depth, seconds: plain[depth].run(way, depth, seconds),
        **{name: contestant(name) for name in (CHECKED, UNCHECKED)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, clean up."""
    options = parse(arguments)
    if Fio.version() is None:
        if options.save:
            raise SystemExit("--save keeps ratios to fio, which is not installed: install fio or leave --save out")
        print("fio is not installed: only the page file is measured", file=sys.stderr)
    rows, settings = measure_all(options)
    record = {
        "benchmark": "io", "surroundings": common.surroundings(), "settings": settings,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    common.save(options, record, csv_rows(record))
    what = f"{REQUEST_BYTES // MiB} MiB requests, backend {settings['backend']}, bar {BAR} of fio"
    title = f"{what}: median (range; of ratios, 95 %)"
    common.show(title, [line for row in rows for line in row.lines()], record, as_json=options.json)


if __name__ == "__main__":
    main()
