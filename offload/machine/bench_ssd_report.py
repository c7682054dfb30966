"""`offload bench-ssd`: measures folders, shows the table, and recommends the setting for all of them together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from offload.config import ConfigError
from offload.console.live_bar import LiveBar
from offload.console.tables import print_line, print_rows
from offload.machine.bench_ssd import IN_RAM, BenchPlan, Measured, Point, Target, check_target, measure
from pagemem.units import KiB, MiB, format_bytes

#: A setting this near the best one is as good.
NEAR: Final = 0.95
_HEADINGS: Final = ("request", "threads", "checksums", "write GB/s", "read GB/s")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting to take, and what it reached: read and write equally mixed, on the slowest of the paths."""

    page_bytes: int
    threads: int
    gb_per_s: float

    @property
    def config_lines(self) -> list[str]:
        """TOML for a configuration file. No page measured here is longer than `ssd.max_request` is by default."""
        return ["[memory]", f'page = "{config_size(self.page_bytes)}"', "[ssd]", f"threads = {self.threads}"]


def config_size(n_bytes: int) -> str:
    """A size as a configuration has it, exactly: "4MiB"."""
    return f"{n_bytes // MiB}MiB" if n_bytes % MiB == 0 else f"{n_bytes // KiB}KiB"


def recommend(results: Sequence[Measured]) -> Recommendation:
    """The best setting with checksums: of all within 5 % of the fastest those with the fewest threads, of these the
    smallest page.

    Pages are striped over the paths in equal shares, so a setting is as good as on the path where it is slowest.
    """
    slowest: dict[tuple[int, int], float] = {}
    for point in (point for result in results for point in result.points if point.setting.checksums):
        key = point.setting.threads, point.setting.request_bytes
        slowest[key] = min(slowest.get(key, point.both_gb_per_s), point.both_gb_per_s)
    best = max(slowest.values())
    threads, page_bytes = min(key for key, rate in slowest.items() if rate >= NEAR * best)
    return Recommendation(page_bytes, threads, slowest[threads, page_bytes])


def run_bench_ssd(paths: Sequence[Path], plan: BenchPlan, console: Console, *, as_json: bool = False) -> list[Measured]:
    """Measure the folders one after another and print what came of it; with ``as_json`` the last line is one JSON
    object.

    Every folder is checked before the first one is measured. What is made in them is removed, also after an error or
    Ctrl-C.

    Raises:
        ConfigError: a folder is named twice.
        StorageError: a folder cannot be measured, or its disk failed.
        DiskFullError: it has no room.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"the same folder is named twice: {', '.join(map(str, paths))}")
    targets = [check_target(path, plan.file_bytes) for path in paths]
    results = [_measure(target, plan, console) for target in targets]
    for result in results:
        if not console.is_terminal:
            print_line(console, backend_line(result))
        print_rows(backend_line(result), [point_cells(point) for point in result.points], console, _HEADINGS)
    advice = recommend(results)
    for line in advice_lines(advice, n_paths=len(results)):
        print_line(console, line)
    if as_json:
        print_line(console, json.dumps(as_record(results, plan, advice)))
    return results


def as_record(results: Sequence[Measured], plan: BenchPlan, advice: Recommendation) -> dict[str, Any]:
    """All of it as JSON values; rates in 10^9 bytes a second, not rounded."""
    return {
        "command": "bench-ssd",
        "file_bytes": plan.file_bytes,
        "seconds": plan.seconds,
        "paths": [
            {
                "path": str(result.target.path),
                "file_system": result.target.file_system,
                "free_bytes": result.target.free_bytes,
                "in_use_by": result.target.holder,
                "backend": result.backend,
                "points": [
                    {
                        **asdict(point.setting),
                        "write_gb_per_s": point.write_gb_per_s,
                        "read_gb_per_s": point.read_gb_per_s,
                    }
                    for point in result.points
                ],
            }
            for result in results
        ],
        "recommendation": {**asdict(advice), "config": "\n".join(advice.config_lines)},
    }


def target_line(target: Target, plan: BenchPlan) -> str:
    """What is about to be measured."""
    line = (
        f"{target.path}: {target.file_system}, {format_bytes(target.free_bytes)} free, test file of "
        f"{format_bytes(plan.file_bytes)}"
    )
    if target.file_system in IN_RAM:
        line += "; this is RAM, not a disk"
    if target.holder is not None:
        line += (
            f"; a run of process {target.holder} uses this folder: the two slow each other, and the figures are too low"
        )
    return line


def advice_lines(advice: Recommendation, n_paths: int) -> list[str]:
    """The recommendation in words and as configuration."""
    where = "" if n_paths == 1 else " on the slowest path"
    lines = [
        f"recommended, {advice.gb_per_s:.2f} GB/s with reads and writes equally mixed{where}:",
        *advice.config_lines,
    ]
    if advice.page_bytes > 256 * KiB:
        lines.append(
            f'# with small layers a page of {config_size(advice.page_bytes)} wastes room; page = "auto" weighs that'
        )
    return lines


def backend_line(result: Measured) -> str:
    """Which way the bytes went."""
    if result.backend == "direct":
        return f"{result.target.path}: O_DIRECT, past the page cache"
    return (
        f"{result.target.path}: aiofiles, as O_DIRECT is refused here; figures are those of the page cache, not of "
        "the disk"
    )


def point_cells(point: Point) -> list[str]:
    """One line of the table."""
    setting = point.setting
    checksums = "on" if setting.checksums else "off"
    rates = (f"{rate:.2f}" for rate in (point.write_gb_per_s, point.read_gb_per_s))
    return [config_size(setting.request_bytes), str(setting.threads), checksums, *rates]


def _measure(target: Target, plan: BenchPlan, console: Console) -> Measured:
    print_line(console, target_line(target, plan))
    with LiveBar(console, MofNCompleteColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("writing the test file", total=len(plan.settings))

        def show(point: Point) -> None:
            size, threads, _, write, read = point_cells(point)
            bar.move(task, advance=1, description=f"{size}, threads {threads}: write {write}, read {read} GB/s")

        return measure(target, plan, show)
