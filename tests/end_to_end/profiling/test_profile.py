"""Profiles of real engines: what is recorded is what happened, training is not changed by it, and the files can be
read."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import RAM_BYTES, assert_closed, assert_equal, batches, built, config, engine_of, train, train_plain

import offload
from offload.profiling.html_report import report_data
from offload.profiling.profile import Profile
from offload.profiling.summary import summary_rows
from pagemem.errors import RunDirectoryError
from pagemem.frames.allocator import PageAllocator
from pagemem.telemetry.events import EventKind, NullSink
from pagemem.tier import Tier

MIB = 1 << 20
FILES = {"trace.json", "report.html", "summary.json"}
WARM_UP = 3  # Two steps on demand, and the first by plan.


def steps(engine: offload.Engine, first: int, count: int) -> None:
    """Some of the steps that `train` makes."""
    for batch in batches(first + count)[first:]:
        engine.backward(engine(*batch))
        engine.step()


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


def recorded(tmp_path: Path, count: int = 4, **update: Any) -> tuple[Profile, offload.Stats, offload.Engine]:
    """A profile of steps by plan, at rest before and after, what the engine counted meanwhile, and the closed
    engine."""
    with engine_of(built(), tmp_path, **update) as engine:
        steps(engine, 0, WARM_UP)
        engine.drain()
        before = engine.stats()
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, WARM_UP, count)
            engine.drain()
        return profile, engine.stats().since(before), engine


def stored_bytes(book: PageAllocator) -> int:
    return sum(book.held(tensor).n_bytes for tensor in book.tensors())


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
        assert {"forward", "backward", "update"} <= {op.phase for op in recording.ops}
        assert all(begin.end_s <= end.start_s for begin, end in zip(recording.ops, recording.ops[1:], strict=False))
        assert "copies to the device" in (tmp_path / "profile" / "trace.json").read_text()
        assert tier.driver.watcher is None and tier.mover.watcher is None
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
        plan = engine.debug.driver.plan
        assert plan is not None
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, 8, 5 * plan.n_steps)
    for what in ("read_bytes", "written_bytes"):
        told = profile.summary["plan"][what]
        # A move under way at either end is of one side or the other.
        assert told["planned"] > 0 and abs(told["measured"] - told["planned"]) < 0.2 * told["planned"], what
    assert profile.summary["plan"]["step_s"]["planned"] == pytest.approx(plan.step_s)


def test_in_lock_free_mode_the_updaters_waits_are_not_the_training_threads(tmp_path: Path) -> None:
    with engine_of(built(blocks=6), tmp_path, ram=10 * MIB, mode="lock-free", exact_steps=0, max_staleness=2) as engine:
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


# ---- when nobody profiles -------------------------------------------------------------------------------------------


def test_after_the_block_nobody_is_told(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, 0, 1)
        store = engine.debug.store
        assert (
            store.driver.watcher is store.mover.watcher is store.mover.copies.watcher is store.budget._watcher is None
        )
        assert isinstance(store.counters.onward, NullSink)
        before = profile._recorder.finish({})
        steps(engine, 1, 2)
        after = profile._recorder.finish({})
        assert (len(before.ops), len(before.events), len(before.waits)) == (
            len(after.ops),
            len(after.events),
            len(after.waits),
        )
        assert before.n_calls == after.n_calls


def test_an_error_in_the_block_leaves_no_files_and_a_whole_engine(tmp_path: Path) -> None:
    plain = built()
    train_plain(plain, adamw(plain.parameters()), 3)
    with engine_of(built(), tmp_path) as engine:
        steps(engine, 0, 1)
        with pytest.raises(ZeroDivisionError), engine.profile(tmp_path / "profile") as profile:
            steps(engine, 1, 1)
            raise ZeroDivisionError
        assert profile.recording is None and list((tmp_path / "profile").iterdir()) == []
        assert engine.debug.driver.watcher is None
        steps(engine, 2, 1)
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_files_that_cannot_be_written_are_an_error_and_the_folder_can_be_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with engine_of(built(), tmp_path) as engine:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
            patched.setattr("offload.profiling.profile.write_trace", full)
            with engine.profile(tmp_path / "profile"):
                steps(engine, 0, 1)
        assert engine.debug.driver.watcher is None
        with engine.profile(tmp_path / "profile"):
            steps(engine, 1, 1)
        assert {path.name for path in (tmp_path / "profile").iterdir()} == FILES
    assert_closed(engine)


def test_one_profile_at_a_time_each_used_once_and_only_of_a_running_engine(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        with engine.profile(tmp_path / "a") as profile:
            steps(engine, 0, 1)
            with pytest.raises(RuntimeError, match="being profiled already"), engine.profile(tmp_path / "b"):
                pass
        assert not (tmp_path / "b").exists() and profile.recording is not None
        with pytest.raises(RuntimeError, match="used once"), profile:
            pass
        assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    with pytest.raises(RuntimeError, match="closed"):
        engine.profile(tmp_path / "c")


def test_a_block_without_a_step_has_a_report_too(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        with engine.profile(tmp_path / "profile") as profile:
            pass
        rows = dict(summary_rows(profile.summary))
        assert rows["steps"].startswith("0 (") and rows["step, mean against planned"] == "no whole step, no plan"
        assert profile.recording is not None and report_data(profile.recording, profile.summary)["step_ends_s"] == []


@pytest.mark.parametrize("name", ["notes.txt", "summary.json"])
def test_a_folder_with_other_files_is_refused_and_left(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / name).write_text("{}")
    with engine_of(built(), tmp_path) as engine:
        with pytest.raises(RunDirectoryError, match="holds files that are not of a profile"), engine.profile(folder):
            raise AssertionError("the block was entered")
        assert engine.debug.driver.watcher is None
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "{}"}


# ---- the files ------------------------------------------------------------------------------------------------------


def test_every_event_of_the_trace_is_whole(tmp_path: Path) -> None:
    profile, _, _ = recorded(tmp_path)
    recording, loaded = profile.recording, json.loads((profile.folder / "trace.json").read_text())
    assert recording is not None
    events, end_us = loaded["traceEvents"], (recording.end_s - recording.begin_s) * 1e6 + 0.01
    by_track: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert {"name", "ph", "ts", "pid", "tid"} <= set(event) and event["pid"] == 1
        assert event["ph"] in "MXCi" and 0 <= event["ts"] <= end_us, event
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] + event["dur"] <= end_us + 1000
            by_track[event["tid"]].append(event)
    for track in by_track.values():
        track.sort(key=lambda event: event["ts"])
        # One after the other, up to the rounding of each time to a thousandth of a microsecond.
        assert all(one["ts"] + one["dur"] <= two["ts"] + 0.003 for one, two in itertools.pairwise(track))
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(by_track) <= set(names) and len(set(names.values())) == len(names)
    assert {"steps", "compute", "updates", "SSD reads", "SSD writes", "bytes held"} <= set(names.values())
    assert sum(event["ph"] == "X" and names[event["tid"]] == "compute" for event in events) == len(recording.ops)
    reads = [event for event in events if event["ph"] == "X" and names[event["tid"]].startswith("SSD reads")]
    assert sum(event["args"]["bytes"] for event in reads) == profile.summary["lanes"]["read"]["bytes"]
    assert [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 1] == [
        f"step {k}" for k in (1, 2, 3, 4)
    ]


def test_counters_of_the_trace_go_forward_and_end_where_the_timeline_does(tmp_path: Path) -> None:
    profile, _, _ = recorded(tmp_path)
    assert profile.recording is not None
    events = json.loads((profile.folder / "trace.json").read_text())["traceEvents"]
    for tier in (Tier.HOST, Tier.SSD):
        counters = [event for event in events if event["ph"] == "C" and event["name"] == f"{tier.value} bytes"]
        assert [event["ts"] for event in counters] == sorted(event["ts"] for event in counters)
        samples = profile.recording.timeline.samples(tier)
        assert [sum(event["args"].values()) for event in counters] == [sample.total_bytes for sample in samples]
        assert len({tuple(event["args"]) for event in counters}) == 1, "every counter names every tag"


def test_the_summary_is_what_the_profile_says_and_the_recorder_counts_itself(tmp_path: Path) -> None:
    profile, _, _ = recorded(tmp_path)
    assert json.loads((profile.folder / "summary.json").read_text()) == profile.summary
    overhead = profile.summary["overhead"]
    assert overhead["calls"] > 4 * 2 * len({row["name"] for row in profile.summary["modules"]})
    assert 0 < overhead["training_spent_s"] <= overhead["spent_s"] and 0 < overhead["training_share"] < 1
    shown = dict(summary_rows(profile.summary))
    assert shown["the recorder itself"].endswith(f"in {overhead['calls']:,} calls")
    assert shown["host peak of budget"].split(" of ")[1].startswith("1.0 MiB: ")


def test_the_report_names_no_address_and_holds_the_course_of_every_tag(tmp_path: Path) -> None:
    profile, _, _ = recorded(tmp_path)
    page = (profile.folder / "report.html").read_text()
    assert "http://www.w3.org/2000/svg" in page  # A name, not fetched; there is no other.
    assert (
        page.replace("http://www.w3.org/2000/svg", "").count("://") == 0 and "src=" not in page and "<link" not in page
    )
    assert profile.recording is not None
    data = report_data(profile.recording, profile.summary, n_buckets=50)
    assert [tier["name"] for tier in data["tiers"]] == ["host"]
    for tier in data["tiers"]:
        course = list(zip(*tier["tags"].values(), strict=True))
        assert len(course) == 50 and max(map(sum, course)) == profile.summary["tiers"][tier["name"]]["peak_bytes"]
        assert set(tier["tags"]) == set(profile.summary["tiers"][tier["name"]]["tag_peaks"])
    for lane in data["lanes"]:
        assert all(len(part) == 50 and 0 <= min(part) <= max(part) <= 1 for part in lane["parts"].values())
    elapsed_s, lanes = profile.summary["elapsed_s"], profile.summary["lanes"]
    assert set(data["rates"]) == {"read", "write"}
    for lane, course in data["rates"].items():
        moved = sum(course) * elapsed_s / len(course)
        assert len(course) == 6 and moved == pytest.approx(lanes[lane]["bytes"], rel=0.05), "each byte is in one place"


def test_the_summary_says_of_what_run_and_model_it_is_and_when(tmp_path: Path) -> None:
    before = datetime.now().astimezone().replace(microsecond=0)
    with engine_of(built(), tmp_path) as engine:
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, 0, 1)
        n_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        with engine.profile(tmp_path / "profile", "mine") as named:
            pass
    assert (profile.summary["title"], named.summary["title"]) == ("GPT", "mine")
    assert profile.summary["model"] == f"GPT, {n_parameters:,} parameters"
    assert before <= datetime.fromisoformat(profile.summary["made_at"]) <= datetime.now().astimezone()
    assert named.summary["bottleneck"] == "No whole step was recorded: record at least one."
