"""The page file against fio on the same file system: ``python -m benchmarks.io [--dir D] [--seconds 3] [--json]``.

Reads and writes of 4 MiB with 1, 2 and 4 requests under way, checksums on and off, interleaved with fio's direct I/O
(libaio) of the same size and depth. The ratio is the median over rounds of ours divided by fio's of the same round, so
that a drift of the disk cancels. Like with like: all work on one and the same file of random bytes, written before
anything is measured, and all have one buffer a request under way, in huge pages. One counts as under way until it is
verified. What is asked of the page file are routes made beforehand, as the engine makes one a tensor and keeps it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Final

from benchmarks.fio import Fio, Sample
from pagemem.page import Extent, FrameId
from pagemem.page_file import PageFiles
from pagemem.run_directory import RunDirectory
from pagemem.units import GiB, MiB

REQUEST_BYTES: Final = 4 * MiB
FILE_BYTES: Final = 512 * MiB
DEPTHS: Final = (1, 2, 4)
BAR: Final = 0.9
#: Contestants, in the order of the table's columns.
FIO, CHECKED, UNCHECKED = "fio", "checksums", "no checksums"


class PageFileRun:
    """Page files over `FILE_BYTES` of the directory's page file, and the memory they are read into and written from."""

    def __init__(self, directory: RunDirectory, checksums: bool, limit_mb_per_s: float | None = None) -> None:
        self.files = PageFiles(
            [directory], page_bytes=REQUEST_BYTES, checksums=checksums, limit_mb_per_s=limit_mb_per_s
        )
        self.n_frames = FILE_BYTES // REQUEST_BYTES
        # One buffer a request under way, as fio has.
        self._memory = mmap.mmap(-1, max(DEPTHS) * REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # as the engine's arenas
        self._view = memoryview(self._memory)
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
        self.drive("write", 4, lambda n: n < self.n_frames)

    def refresh(self) -> None:
        """Fresh random bytes to write."""
        for start in range(0, len(self._view), REQUEST_BYTES):
            self._view[start : start + REQUEST_BYTES] = os.urandom(REQUEST_BYTES)

    def run(self, way: str, depth: int, seconds: float) -> Sample:
        """Measure sequential transfers with ``depth`` under way, as the engine has them."""
        if way == "write":
            self.refresh()
        end_s = time.perf_counter() + seconds
        return self.drive(way, depth, lambda n: time.perf_counter() < end_s)

    def drive(self, way: str, depth: int, more: Callable[[int], bool]) -> Sample:
        """Keep ``depth`` transfers under way, each begun where one ends, while ``more`` accepts the next number."""
        begin = self.files.read if way == "read" else self.files.write
        numbers, lock, over = count(), threading.Lock(), threading.Event()
        errors: list[BaseException] = []
        moved_bytes, under_way = 0, depth

        def start(slot: int, number: int) -> None:
            buffer = self._view[slot * REQUEST_BYTES : (slot + 1) * REQUEST_BYTES]
            begin(self._routes[number % self.n_frames], buffer, lambda error: ended(slot, error))

        def ended(slot: int, error: BaseException | None) -> None:
            nonlocal moved_bytes, under_way
            with lock:
                moved_bytes += REQUEST_BYTES
                number = next(numbers)
                if error is not None:
                    errors.append(error)
                if errors or not more(number):
                    under_way -= 1
                    if under_way == 0:
                        over.set()
                    return
            start(slot, number)

        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for slot, number in enumerate([next(numbers) for _ in range(depth)]):
            start(slot, number)
        over.wait()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if errors:
            raise errors[0]
        return Sample(moved_bytes, wall_s, cpu_s)

    def close(self) -> None:
        """Give back threads, descriptors and memory."""
        self.files.close()
        self._view.release()
        self._memory.close()


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(round(value, 3) for value in (statistics.median(values), min(values), max(values))))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.greatest:.2f})"


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
                name: Spread.of([our.gb_per_s / fio.gb_per_s for our, fio in zip(samples[name], samples[FIO])])
                for name in ours
            },
        )

    def cells(self, names: Sequence[str]) -> list[str]:
        """The row as text, in the order of `headings`."""
        speeds = [str(self.gb_per_s[name]) for name in names]
        ratios = [str(ratio) for ratio in self.ratio_to_fio.values()]
        return [self.way, str(self.depth), *speeds, *ratios, *(f"{self.cpu_s_per_gb[name]:.3f}" for name in names)]


def headings(names: Sequence[str]) -> list[str]:
    """Column titles for these contestants."""
    ratios = [f"{name} / fio" for name in names if name != FIO and FIO in names]
    return ["way", "depth", *(f"{name} GB/s" for name in names), *ratios, *(f"{name} cpu s/GB" for name in names)]


def measure(
    contestants: dict[str, Callable[[str, int, float], Sample]],
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


def show(rows: Sequence[Row], names: Sequence[str]) -> None:
    """A table on a terminal, tab-separated lines in a pipe."""
    lines = [row.cells(names) for row in rows]
    if not sys.stdout.isatty():
        for line in [headings(names), *lines]:
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings(names), title=f"{REQUEST_BYTES // MiB} MiB requests: median (least-greatest)")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def environment(folder: Path, backend: str, fio_version: str | None) -> dict[str, Any]:
    """What the figures depend on: hardware, system, versions."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return {
        "date": date.today().isoformat(),
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GiB, 1),
            "file_system": max(around, key=lambda mount: len(mount[0]))[1],
        },
        "versions": {
            "python": platform.python_version(),
            "kernel": platform.release().split("-")[0],
            "fio": fio_version,
            **{name: version(name) for name in ("numpy", "xxhash", "aiofiles")},
        },
        "backend": backend,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.io", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to put the files (default: here)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each single measurement (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: 5)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the result as a JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, clean up."""
    options = parse(arguments)
    fio_version = Fio.version()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagemem-io-", dir=options.dir)))
        directory = stack.enter_context(RunDirectory(folder / "run"))
        unchecked, checked = PageFileRun(directory, checksums=False), PageFileRun(directory, checksums=True)
        stack.callback(unchecked.close)
        stack.callback(checked.close)

        def prepare() -> None:
            unchecked.fill()
            checked.fill()  # last: its checksums are those of the file's bytes

        backend = checked.files.backend_name
        contestants: dict[str, Callable[[str, int, float], Sample]] = {CHECKED: checked.run, UNCHECKED: unchecked.run}
        if fio_version is None:
            print("fio is not installed: only the page file is measured", file=sys.stderr)
        else:
            fio = Fio(checked.path, FILE_BYTES, REQUEST_BYTES, direct=backend == "direct")
            contestants = {FIO: fio.run, **contestants}
        rows: list[Row] = []
        for row in measure(contestants, prepare, options.seconds, options.rounds):
            rows.append(row)
            print(f"measured {row.way}, depth {row.depth}", file=sys.stderr)
        result = environment(folder, backend, fio_version)
    print(f"page file backend: {backend}; bar: {BAR} of fio")
    show(rows, list(contestants))
    settings = {"request_bytes": REQUEST_BYTES, "file_bytes": FILE_BYTES, "seconds": options.seconds, "rounds": options.rounds}
    record = {"benchmark": "io", **result, "settings": settings, "rows": [asdict(row) for row in rows]}
    if options.save is not None:
        options.save.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
