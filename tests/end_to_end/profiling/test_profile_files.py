"""Profiling that ends early or is not asked for, and the files it writes."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from parity import adamw
from recorded_runs import recorded, steps
from small_runs import assert_closed, assert_equal, built, engine_of, train_plain

from offload.profiling.html_report import report_data
from offload.profiling.summary import summary_rows
from pagemem.errors import RunDirectoryError
from pagemem.telemetry.events import NullSink
from pagemem.tier import Tier

FILES = {"trace.json", "report.html", "summary.json"}


# ---- when nobody profiles -------------------------------------------------------------------------------------------


def test_after_the_block_nobody_is_told(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, 0, 1)
        store = engine.debug.store
        assert (
            store.driver.watcher
            is store.mover.monitor.watcher
            is store.mover.copies.watcher
            is store.budget._watcher
            is None
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
