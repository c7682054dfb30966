"""The recommendation and the lines of `offload bench-ssd`, worked by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from offload.config import SsdConfig
from offload.config_loading import load_config
from offload.machine.bench_ssd import (
    DEFAULT_THREADS,
    REQUEST_BYTES,
    THREADS,
    USUAL_REQUEST_BYTES,
    BenchPlan,
    Measured,
    Point,
    Setting,
    Target,
    full_plan,
)
from offload.machine.bench_ssd_report import (
    Recommendation,
    advice_lines,
    backend_line,
    config_size,
    point_cells,
    recommend,
    target_line,
)
from pagemem.units import GiB, KiB, MiB

TARGET = Target(Path("/disk"), "ext4", 3 * GiB, None)


def measured(rates: dict[tuple[int, int], float], *, checksums: bool = True) -> Measured:
    """A folder where writing and reading reach the same rate, by threads and request size."""
    points = tuple(Point(Setting(size, threads, checksums), rate, rate) for (threads, size), rate in rates.items())
    return Measured(TARGET, "direct", points)


def test_both_directions_together_by_hand() -> None:
    # 1 GB at 1 GB/s and 1 GB at 3 GB/s: 2 GB in 4/3 s.
    assert Point(Setting(MiB, 1), 1.0, 3.0).both_gb_per_s == pytest.approx(1.5)


def test_near_the_best_the_fewest_threads_and_then_the_smallest_page_win() -> None:
    rates = {(1, MiB): 1.0, (1, 4 * MiB): 1.94, (2, MiB): 2.89, (2, 4 * MiB): 2.95, (4, MiB): 2.8, (4, 4 * MiB): 3.0}
    assert recommend([measured(rates)]) == Recommendation(MiB, 2, pytest.approx(2.89))
    assert recommend([measured({**rates, (2, MiB): 2.84})]) == Recommendation(4 * MiB, 2, pytest.approx(2.95))
    assert recommend([measured({**rates, (4, 4 * MiB): 3.2})]) == Recommendation(4 * MiB, 4, pytest.approx(3.2))


def test_the_slowest_path_counts() -> None:
    fast, slow = {(1, MiB): 5.0, (4, MiB): 9.0}, {(1, MiB): 2.0, (4, MiB): 1.0}
    assert recommend([measured(fast), measured(slow)]) == Recommendation(MiB, 1, pytest.approx(2.0))


def test_points_without_checksums_are_not_recommended() -> None:
    both = Measured(
        TARGET, "direct", measured({(4, MiB): 1.0}).points + measured({(1, 4 * MiB): 9.0}, checksums=False).points
    )
    assert recommend([both]) == Recommendation(MiB, 4, pytest.approx(1.0))


@pytest.mark.parametrize("page_bytes", REQUEST_BYTES)
@pytest.mark.parametrize("threads", THREADS)
def test_every_recommendation_is_a_configuration(page_bytes: int, threads: int) -> None:
    raw = tomllib.loads("\n".join(Recommendation(page_bytes, threads, 1.0).config_lines))
    raw["memory"]["ram"] = "1GiB"
    raw["ssd"]["paths"] = ["/disk"]
    config = load_config(raw)
    assert config.memory.page == page_bytes and config.ssd.threads == threads and config.ssd.max_request >= page_bytes


def test_the_plan_holds_the_engines_defaults_with_and_without_checksums() -> None:
    defaults = SsdConfig(paths=["/disk"])
    assert (defaults.max_request, defaults.threads, defaults.checksums) == (max(REQUEST_BYTES), DEFAULT_THREADS, True)
    settings = full_plan(512 * MiB, 0.5).settings
    assert [s for s in settings if not s.checksums] == [Setting(USUAL_REQUEST_BYTES, DEFAULT_THREADS, checksums=False)]
    assert {(s.request_bytes, s.threads) for s in settings if s.checksums} == {
        (size, n) for size in REQUEST_BYTES for n in THREADS
    }


def test_a_plan_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--size is 127\.0 MiB, but 8 requests of 16\.0 MiB .* at least 128\.0 MiB"):
        full_plan(127 * MiB, 0.5)
    assert full_plan(128 * MiB + 1, 0.5).file_bytes == 144 * MiB
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--seconds"):
            BenchPlan(MiB, seconds, (Setting(64 * KiB, 1),))


def test_lines_by_hand() -> None:
    plan = BenchPlan(MiB, 0.5, (Setting(64 * KiB, 1),))
    assert target_line(TARGET, plan) == "/disk: ext4, 3.0 GiB free, test file of 1.0 MiB"
    assert "process 12" in target_line(Target(Path("/disk"), "ext4", GiB, "12"), plan)
    assert target_line(Target(Path("/disk"), "tmpfs", GiB, None), plan).endswith("; this is RAM, not a disk")
    assert point_cells(Point(Setting(256 * KiB, 2, checksums=False), 1.234, 2.345)) == [
        "256KiB",
        "2",
        "off",
        "1.23",
        "2.35",
    ]
    assert config_size(4 * MiB) == "4MiB" and config_size(256 * KiB) == "256KiB"
    assert "O_DIRECT, past" in backend_line(Measured(TARGET, "direct", ()))
    assert "refused" in backend_line(Measured(TARGET, "aiofiles", ()))
    assert advice_lines(Recommendation(256 * KiB, 2, 1.5), n_paths=1) == [
        "recommended, 1.50 GB/s with reads and writes equally mixed:",
        "[memory]",
        'page = "256KiB"',
        "[ssd]",
        "threads = 2",
    ]
    several = advice_lines(Recommendation(16 * MiB, 4, 1.5), n_paths=2)
    assert several[0].endswith("on the slowest path:") and 'page = "16MiB"' in several and "wastes room" in several[-1]
