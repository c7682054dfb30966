"""What bytes cost the compute beside them: ``python -m benchmarks.disk.interference [--dir D] [--rate 800] [--json]``.

Matrix products run on all cores while a file is read or written at a fixed rate: by fio (a process of its own, libaio),
by the page file without and with checksums (threads of the computing process, as in training). Each is compared with
the products alone, measured right before it, so that a drift of the machine cancels; within a round the order turns.
Lost are the seconds of the window minus those its products take alone; they are given for each GB moved meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.disk.fio import Fio
from benchmarks.disk.io import FILE_BYTES, REQUEST_BYTES, PageFileRun
from pagemem.folders.run_directory import RunDirectory
from pagemem.units import MiB

DEPTH: Final = 2
#: What must have moved before a window begins, so that no start is inside it.
RUN_UP_BYTES: Final = 64 * MiB
START_LIMIT_S: Final = 30.0

#: Counts bytes moved since the traffic began.
Moved = Callable[[], int]
#: Begins traffic one way, and ends it with its context.
Traffic = Callable[[str], AbstractContextManager[Moved]]


@dataclass(frozen=True, slots=True)
class Window:
    """Some seconds of compute: how many products were done and how many bytes were moved beside them."""

    wall_s: float
    n_products: int
    n_bytes: int = 0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second."""
        return self.n_bytes / self.wall_s / 1e9

    def slowdown(self, alone: Window) -> float:
        """Time of a product over that of one alone."""
        return (self.wall_s / self.n_products) / (alone.wall_s / alone.n_products)

    def lost_s_per_gb(self, alone: Window) -> float:
        """Seconds of this window that the products would not have needed alone, for 10^9 bytes moved in it."""
        needed_s = self.n_products * alone.wall_s / alone.n_products
        return (self.wall_s - needed_s) / self.n_bytes * 1e9


class Products:
    """Matrix products of the shape of a small model's layers, on torch's threads."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._left = torch.randn(1024, 512, generator=generator)
        self._right = torch.randn(512, 2048, generator=generator)
        self._out = torch.empty(1024, 2048)

    def run(self, seconds: float, moved: Moved | None = None) -> Window:
        """Compute for about ``seconds``."""
        before_bytes, n_products, start_s = moved() if moved else 0, 0, time.perf_counter()
        while (wall_s := time.perf_counter() - start_s) < seconds:
            for _ in range(10):
                torch.mm(self._left, self._right, out=self._out)
            n_products += 10
        return Window(wall_s, n_products, moved() - before_bytes if moved else 0)


def fio_traffic(fio: Fio, bytes_per_s: int, seconds: float) -> Traffic:
    """Traffic by fio, given up after ``seconds`` at the latest."""

    @contextmanager
    def traffic(way: str) -> Iterator[Moved]:
        process = fio.start(way, DEPTH, seconds, bytes_per_s)
        counters = Path(f"/proc/{process.pid}/io")
        key = {"read": "read_bytes", "write": "write_bytes"}[way]

        def moved() -> int:
            if process.poll() is not None:
                raise RuntimeError(f"fio ended by itself with status {process.returncode}; its message is above")
            return int(dict(line.split(": ") for line in counters.read_text().splitlines())[key])

        try:
            yield moved
        finally:
            process.terminate()
            process.wait()

    return traffic


def page_file_traffic(run: PageFileRun) -> Traffic:
    """Traffic by page files whose rate is limited."""

    @contextmanager
    def traffic(way: str) -> Iterator[Moved]:
        over = threading.Event()
        errors: list[BaseException] = []

        def drive() -> None:
            try:
                run.drive(way, lambda n: not over.is_set())
            except BaseException as error:  # raised below, on the thread that measures
                errors.append(error)

        def total_bytes() -> int:
            return run.files.reads.n_bytes + run.files.writes.n_bytes

        before_bytes = total_bytes()
        thread = threading.Thread(target=drive, name="traffic")
        thread.start()
        try:
            yield lambda: total_bytes() - before_bytes
        finally:
            over.set()
            thread.join()
        if errors:
            raise errors[0]

    return traffic


def beside(products: Products, traffic: AbstractContextManager[Moved], seconds: float) -> Window:
    """Compute beside traffic that is well under way.

    Raises:
        TimeoutError: the traffic does not begin.
    """
    with traffic as moved:
        limit_s = time.perf_counter() + START_LIMIT_S
        while moved() < RUN_UP_BYTES:
            if time.perf_counter() > limit_s:
                raise TimeoutError(f"only {moved()} bytes were moved in {START_LIMIT_S} s")
            time.sleep(0.01)
        return products.run(seconds, moved)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: a way, a contestant, and the spread over the rounds."""

    way: str
    contestant: str
    gb_per_s: Spread
    slowdown: Spread
    lost_s_per_gb: Spread

    @classmethod
    def of(cls, way: str, contestant: str, pairs: Sequence[tuple[Window, Window]]) -> Row:
        """From (alone, beside) of each round."""
        return cls(
            way,
            contestant,
            Spread.of([window.gb_per_s for _, window in pairs]),
            Spread.of([window.slowdown(alone) for alone, window in pairs]),
            Spread.of([window.lost_s_per_gb(alone) for alone, window in pairs]),
        )

    def line(self) -> tuple[str, str]:
        """As text, for `common.show`."""
        what = f"{self.way}, {self.contestant}"
        return (
            what,
            f"{self.lost_s_per_gb} at {self.gb_per_s.median:.2f} GB/s; a product takes {self.slowdown} of its time",
        )


def measure(contestants: Mapping[str, Traffic], way: str, seconds: float, rounds: int) -> list[Row]:
    """All contestants one way, in turns."""
    products, names = Products(), list(contestants)
    products.run(seconds)  # warm-up
    pairs: dict[str, list[tuple[Window, Window]]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            alone = products.run(seconds)
            pairs[name].append((alone, beside(products, contestants[name](way), seconds)))
        print(f"measured {way}, round {turn + 1} of {rounds}", file=sys.stderr)
    return [Row.of(way, name, found) for name, found in pairs.items()]


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each way and contestant; the interval is the range over the rounds."""
    settings = record["settings"]
    return [
        common.ratio_row(
            f"product beside {settings['rate_mb_per_s']} MB/s of {row['contestant']}, {row['way']} / alone (range)",
            Spread(**row["slowdown"]), threads=record["surroundings"]["threads"], pairs=settings["rounds"],
        )
        for row in record["rows"]
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disk.interference", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rate", type=int, default=800, help="10^6 bytes a second to move (default: 800)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each single measurement (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each figure (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    common.common_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, clean up."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    fio_version, rows = Fio.version(), list[Row]()
    with ExitStack() as stack:
        Path(options.dir).mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="interference-", dir=options.dir)))
        directory = stack.enter_context(RunDirectory(folder / "run"))
        runs = {
            name: PageFileRun(directory, checksums, DEPTH, limit_mb_per_s=options.rate)
            for name, checksums in (("page file without checksums", False), ("page file", True))
        }
        for run in runs.values():
            stack.callback(run.close)
        contestants = {name: page_file_traffic(run) for name, run in runs.items()}
        backend, path = run.files.backend_name, run.path
        if fio_version is None:
            print("fio is not installed: only the page file is measured", file=sys.stderr)
        else:
            fio = Fio(path, FILE_BYTES, REQUEST_BYTES, direct=backend == "direct")
            longest_s = START_LIMIT_S + 10 * options.seconds
            contestants = {"fio": fio_traffic(fio, options.rate * 10**6, longest_s), **contestants}
        for way in ("write", "read"):
            for run in runs.values():
                run.fill()  # the checked one last: its checksums are those of the file's bytes
            rows += measure(contestants, way, options.seconds, options.rounds)
    settings = {
        "request_bytes": REQUEST_BYTES,
        "depth": DEPTH,
        "rate_mb_per_s": options.rate,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "backend": backend,
        "fio": fio_version,
    }
    found = [dataclasses.asdict(row) for row in rows]
    record = {
        "benchmark": "interference", "surroundings": common.surroundings(), "settings": settings, "rows": found
    }  # fmt: skip
    common.show(
        f"Seconds of compute lost for each GB moved beside it: median (least-greatest) of {options.rounds} rounds",
        [row.line() for row in rows],
        record,
        as_json=options.json,
    )
    common.save(options, record, csv_rows(record))


if __name__ == "__main__":
    main()
