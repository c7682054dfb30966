"""Profiles of real engines: what is recorded is what happened, training is not changed by it, and the files can be
read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from recorded_runs import WARM_UP, recorded, steps
from small_runs import RAM_BYTES, assert_closed, assert_equal, batches, built, config, engine_of, train, train_plain

import offload
from offload.profiling.summary import summary_rows
from pagemem.frames.allocator import PageAllocator
from pagemem.telemetry.events import EventKind
from pagemem.tier import Tier

MIB = 1 << 20


@pytest.mark.parametrize("update", [{}, {"clip_norm": 0.5}])
def test_profiled_steps_have_the_bits_of_others(update: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for profiled in (False, True):
        with engine_of(built(), tmp_path / str(profiled), **update) as engine:
            if profiled:
                with engine.profile(tmp_path / "profile"):
                    steps(engine, 0, 2)
                steps(engine, 2, 2)
                with engine.profile(tmp_path / "profile"):
                    steps(engine, 4, 2)
            else:
                train(engine, 6)
            weights.append(engine.model.state_dict())
            stats = engine.stats()
        assert (stats.steps, stats.deviations) == (6, 0)
        assert_closed(engine)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_with_activations_in_pages_profiled_bits_are_plain_pytorchs(tmp_path: Path) -> None:
    plain, model = built(), built()
    train_plain(plain, adamw(plain.parameters()), 5)
    settings = config(tmp_path)
    settings["memory"]["activations"] = 0
    with offload.initialize(model, settings, adamw) as engine, engine.profile(tmp_path / "profile") as profile:
        train(engine, 5)
        assert_equal(model, plain)
    assert profile.summary["tiers"]["host"]["tag_peaks"]["activation"] > 0
    assert any(row["name"] == "saved activations" for row in profile.summary["modules"])
    assert_closed(engine)


# ---- what is recorded is what happened ------------------------------------------------------------------------------


def stored_bytes(book: PageAllocator) -> int:
    return sum(book.placements[tensor].n_bytes for tensor in book.placements)


@pytest.mark.parametrize("update", [{}, {"clip_norm": 0.5}])
def test_bytes_held_are_those_of_the_memory_report(update: dict[str, Any], tmp_path: Path) -> None:
    with engine_of(built(), tmp_path, **update) as engine:
        for count in (2, 3):
            with engine.profile(tmp_path / "profile") as profile:
                steps(engine, 0, count)
                engine.drain()
            assert profile.recording is not None
            timeline, memory = profile.recording.timeline, engine.memory_report()
            host, ssd = (timeline.samples(tier) for tier in (Tier.HOST, Tier.SSD))
            assert host[-1].total_bytes == memory.tiers["host"].used_bytes
            assert {tag.value: n_bytes for tag, n_bytes in host[-1].by_tag.items()} == memory.by_tag
            assert ssd[-1].total_bytes == stored_bytes(engine.debug.mover.ssd)
            for sample in (*host, *ssd):
                assert sample.total_bytes == sum(sample.by_tag.values()) and min(sample.by_tag.values(), default=0) >= 0
            assert max(sample.total_bytes for sample in host) == profile.summary["tiers"]["host"]["peak_bytes"]
            assert timeline.peak(Tier.HOST).total_bytes <= memory.tiers["host"].peak_bytes <= RAM_BYTES
            assert timeline.peak(Tier.SSD).total_bytes <= memory.tiers["ssd"].peak_bytes
    assert_closed(engine)


@pytest.mark.parametrize("device", ["4MiB", 9 * (64 << 10)], ids=["all", "little"])
def test_with_a_device_its_bytes_and_copies_are_recorded_too(device: int | str, tmp_path: Path) -> None:
    plain = built()
    made = config(tmp_path)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": device, "page": 64 << 10}}
    train_plain(plain, adamw(plain.parameters()), WARM_UP + 4)
    with offload.initialize(built(), made, adamw) as engine:
        steps(engine, 0, WARM_UP)
        engine.drain()
        tier = engine.debug.device_tier
        assert tier is not None
        before, copied_bytes = engine.stats(), tier.mover._copier.copied_bytes
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, WARM_UP, 4)
            engine.drain()
        moved, copied_bytes = engine.stats().since(before), tier.mover._copier.copied_bytes - copied_bytes
        recording, summary = profile.recording, profile.summary
        assert recording is not None and summary["steps"] == 4
        held = recording.timeline.samples(Tier.DEVICE)
        assert held[-1].total_bytes == tier.mover.host.used_frames * (64 << 10)
        assert (
            max(sample.total_bytes for sample in held)
            == summary["tiers"]["device"]["peak_bytes"]
            <= tier.budget.limit_bytes
        )
        assert summary["lanes"]["h2d"]["bytes"] == copied_bytes > 0
        assert (
            summary["lanes"]["read"]["bytes"] == moved.bytes_read
            and summary["lanes"]["write"]["bytes"] == moved.bytes_written
        )
        assert {"forward", "backward"} <= {op.phase for op in recording.ops}
        assert summary["lanes"]["update"]["busy_s"] > 0, "made by the worker, beside the ops"
        assert all(begin.end_s <= end.start_s for begin, end in zip(recording.ops, recording.ops[1:], strict=False))
        assert "copies to the device" in (tmp_path / "profile" / "trace.json").read_text()
        assert engine.debug.driver.watcher is None and tier.mover.monitor.watcher is None
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_with_commits_evaluation_and_a_run_that_goes_on_every_copy_is_counted(tmp_path: Path) -> None:
    for begun in (False, True):
        with engine_of(built(), tmp_path) as engine:
            assert (engine.resume() is not None) == begun
            book = engine.debug.mover.ssd
            before = stored_bytes(book)
            with engine.profile(tmp_path / "profile") as profile:
                steps(engine, 0, 2)
                engine.save()
                steps(engine, 2, 1)
                with torch.no_grad():
                    engine.model(*batches(1)[0])
                engine.save("kept")
                steps(engine, 3, 2)
                engine.save()  # The first one goes.
                engine.drain()
            assert profile.recording is not None
            samples = profile.recording.timeline.samples(Tier.SSD)
            assert (samples[0].total_bytes, samples[-1].total_bytes) == (before, stored_bytes(book))
            host = profile.recording.timeline.samples(Tier.HOST)[-1]
            assert {tag.value: n_bytes for tag, n_bytes in host.by_tag.items()} == engine.memory_report().by_tag
        assert_closed(engine)


def test_moves_ops_and_waits_are_those_that_were_counted(tmp_path: Path) -> None:
    profile, stats, _ = recorded(tmp_path)
    recording, summary = profile.recording, profile.summary
    assert recording is not None
    moved = [sum(event.n_bytes for event in recording.of(kind)) for kind in (EventKind.READ, EventKind.WRITE)]
    assert moved == [stats.bytes_read, stats.bytes_written] and min(moved) > 0
    assert [sum(row[key] for row in summary["modules"]) for key in ("read_bytes", "written_bytes")] == moved
    assert summary["steps"] == summary["planned_steps"] == len(recording.step_ends_s) == 4
    waits_s = sum(wait.end_s - wait.start_s for wait in recording.waits)
    assert waits_s == pytest.approx(stats.wait_s) and sum(row["total_s"] for row in summary["waits"]) == pytest.approx(
        waits_s
    )
    assert sum(row["total_s"] for row in summary["wait_causes"]) == pytest.approx(waits_s)
    assert (
        sum(row["count"] for row in summary["wait_causes"])
        == sum(row["count"] for row in summary["waits"])
        == len(recording.waits)
    )
    assert {op.phase for op in recording.ops} >= {"forward", "backward", "update"}
    assert len(recording.ops) % 4 == 0, "four steps of the same ops"
    assert all(one.end_s <= two.start_s for one, two in zip(recording.ops, recording.ops[1:], strict=False))
    for lane in summary["lanes"].values():
        assert 0 <= lane["share"] <= 1
    both = summary["lanes"]["compute"]["busy_s"] + summary["lanes"]["waits"]["busy_s"]
    assert both <= summary["elapsed_s"] * (1 + 1e-9), "the training thread does one thing at a time"


def test_modules_hold_the_models_bytes_and_have_all_that_is_moved(tmp_path: Path) -> None:
    profile, _, engine = recorded(tmp_path)
    rows = {row["name"]: row for row in profile.summary["modules"]}
    numels = sum(parameter.numel() for parameter in engine.model.parameters())
    held = sum(row["parameter_bytes"] for row in rows.values())
    moments = sum(row["moment_bytes"] for row in rows.values())
    assert 4 * numels <= held < 1.1 * 4 * numels and 8 * numels <= moments < 1.1 * 8 * numels
    assert "other" not in rows, "every tensor that moved is some module's"
    computing = sum(row["compute_s"] for row in rows.values())
    assert 0 < computing <= profile.summary["elapsed_s"]


def test_the_plans_bytes_are_those_that_move_where_every_step_is_alike(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        steps(engine, 0, 8)
        plan = engine.debug.driver.follower.plan
        assert plan is not None
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, 8, 5 * plan.n_steps)
    for what in ("read_bytes", "written_bytes"):
        told = profile.summary["plan"][what]
        # A move under way at either end is of one side or the other.
        assert told["planned"] > 0 and abs(told["measured"] - told["planned"]) < 0.2 * told["planned"], what
    assert profile.summary["plan"]["step_s"]["planned"] == pytest.approx(plan.step_s)


def test_in_lock_free_mode_the_updaters_waits_are_not_the_training_threads(tmp_path: Path) -> None:
    with engine_of(
        built(blocks=6), tmp_path, ram=10 * MIB, mode="lock-free", exact_steps=0, max_staleness=2, on_time="never"
    ) as engine:
        steps(engine, 0, WARM_UP)
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, WARM_UP, 4)
            engine.drain()
    assert profile.recording is not None and profile.recording.of(EventKind.UPDATE)
    assert any(event.name.startswith("states") for event in profile.recording.of(EventKind.READ))
    for wait in profile.recording.waits:
        assert wait.training == (not wait.name.startswith(("states", "master"))), wait
        assert wait.cause.lane in ("read", "write", "update", "none")
    assert profile.summary["tiers"]["host"]["peak_bytes"] <= 10 * MIB
    assert "bytes planned" in dict(summary_rows(profile.summary))
    assert_closed(engine)
