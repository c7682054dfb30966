"""What the engine says of bytes and pages is what happened: plan against use, counters against the system, tags against
tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk
from pairwise import each_value
from parity import adamw, state_bytes
from small_runs import PAGE_BYTES, assert_closed, batches, built, config, engine_of, train
from tiny_models import CASES

import offload
from offload.profiling.stats import MemoryReport

STEPS = 16  # More than two on demand and the longest cycle of a plan.
#: Share of the states that is little RAM, for some models.
LITTLE = {"gpt": 0.22, "tied": 0.25, "conv": 0.55, "partly_trained": 0.45, "borrower": 0.56, "recompute": 0.3}
TAGS = {"parameter", "gradient", "master", "moment", "activation", "staging", "communication"}


def trained(name: str, folder: Path, ram: int, clip_norm: float | None, steps: int = STEPS) -> offload.Engine:
    """An engine that has made some steps."""
    torch.manual_seed(7)
    engine = offload.initialize(CASES[name].build(), config(folder, ram=ram, clip_norm=clip_norm), adamw)
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        engine.backward(engine(*CASES[name].batch(generator)))
        engine.step()
    return engine


def assert_adds_up(report: MemoryReport, ram: int) -> None:
    """Tags sum up to the host's bytes, and no number is beyond what it is bounded by."""
    host, ssd = report.tiers["host"], report.tiers["ssd"]
    assert report.page_bytes == PAGE_BYTES and host.budget_bytes == ram and ssd.budget_bytes is None
    assert sum(report.by_tag.values()) == host.used_bytes
    assert 0 <= host.used_bytes <= host.peak_bytes <= ram
    assert 0 < host.peak_pages <= ram // PAGE_BYTES
    assert 0 < ssd.used_bytes <= ssd.peak_bytes == ssd.peak_pages * PAGE_BYTES


@each_value(name=tuple(LITTLE), share=["little", 0.7, 2.0], clip_norm=[None, 0.5])
def test_planned_peaks_are_the_measured_ones(
    name: str, share: str | float, clip_norm: float | None, tmp_path: Path
) -> None:
    share = LITTLE[name] if isinstance(share, str) else share
    ram = int(share * state_bytes(CASES[name])) // PAGE_BYTES * PAGE_BYTES
    with trained(name, tmp_path, ram, clip_norm) as engine:
        stats, report = engine.stats(), engine.memory_report()
        assert stats.deviations == 0 and stats.planned_steps >= STEPS - 2
        assert stats.steps == stats.planned_steps + stats.on_demand_steps == STEPS
        for tier, use in report.tiers.items():
            assert use.peak_pages == use.planned_peak_pages, tier
        assert_adds_up(report, ram)
    assert_closed(engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_bytes_moved_are_those_the_system_moved(
    clip_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk.install(monkeypatch)
    with engine_of(built(), tmp_path, clip_norm=clip_norm) as engine:
        for _ in range(5):
            train(engine, 2)
            engine.drain()
            stats, files = engine.stats(), engine.debug.page_files
            moved = disk.moved_bytes["read"], disk.moved_bytes["write"]
            assert (stats.bytes_read, stats.bytes_written) == (files.reads.n_bytes, files.writes.n_bytes) == moved
        assert min(moved) > 0
        before = engine.stats()
        train(engine, 1)
        engine.drain()
        since = engine.stats().since(before)
        assert since.steps == 1
        assert since.bytes_read == disk.moved_bytes["read"] - moved[0]
        assert since.bytes_written == disk.moved_bytes["write"] - moved[1]
    assert_closed(engine)


def test_a_model_that_fits_moves_no_byte_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FaultyDisk.install(monkeypatch)
    ram = 3 * state_bytes(CASES["gpt"])
    engine = trained("gpt", tmp_path, ram, None, steps=4)
    engine.drain()
    moved = dict(disk.moved_bytes)
    train(engine, 4)
    engine.drain()
    assert disk.moved_bytes == moved
    assert_closed(engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_tags_add_up_at_every_step(clip_norm: float | None, tmp_path: Path) -> None:
    ram = 1 << 20
    with engine_of(built(), tmp_path, clip_norm=clip_norm) as engine:
        seen: set[str] = set()
        for batch in batches(6):
            engine.backward(engine(*batch))
            engine.step()
            engine.drain()
            report = engine.memory_report()
            assert_adds_up(report, ram)
            assert all(n_bytes % PAGE_BYTES == 0 for n_bytes in report.by_tag.values())
            seen |= set(report.by_tag)
        assert {"parameter", "moment"} <= seen <= TAGS
        assert engine.debug.store.budget.used_bytes <= ram
    assert_closed(engine)


@pytest.mark.parametrize(
    "ram",
    [
        1 << 20,
        2 << 20,
    ],
)
def test_in_the_middle_of_backward_tags_add_up_and_the_budget_holds(ram: int, tmp_path: Path) -> None:
    reports = []
    with offload.initialize(built(), config(tmp_path, ram=ram), adamw) as engine:
        for parameter in engine.model.parameters():
            parameter.register_hook(lambda _gradient: reports.append(engine.memory_report()))  # type: ignore[no-untyped-call]
        train(engine, 4)
        assert len(reports) >= 4 * len(list(engine.model.parameters()))
        for report in reports:
            assert_adds_up(report, ram)
    assert_closed(engine)


def test_after_a_refused_step_and_close_nothing_is_held(tmp_path: Path) -> None:
    engine = engine_of(built(), tmp_path)
    train(engine, 2)
    with pytest.raises(offload.BudgetError), offload.gathered(engine.model):
        pass
    assert engine.debug.store.budget.used_bytes > 0
    report = engine.memory_report()
    assert_adds_up(report, 1 << 20)
    assert_closed(engine)
    assert engine.debug.store.budget.by_tag() == {}
    assert engine.memory_report().tiers["ssd"].peak_pages >= report.tiers["ssd"].peak_pages


def test_page_file_pages_predicted_before_the_first_store_are_those_used(tmp_path: Path) -> None:
    engine = engine_of(built(), tmp_path, ram=16 << 20)
    try:
        mover = engine.debug.mover
        predicted = mover.planned_page_file_frames(list(mover.tensors))
        train(engine, 1)
        engine.drain()
        engine.debug.driver.evict_all()
        assert mover.ssd.used_frames == predicted
    finally:
        assert_closed(engine)
