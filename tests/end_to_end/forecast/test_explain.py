"""`offload plan --explain`: the tasks of the planned step, and the step as a trace with a profile's tracks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forecast_runs import PAGE_BYTES, RATES, gpt_config

from offload.cli import main
from offload.forecast.explained import HEADINGS, explained_rows
from offload.forecast.forecast import forecast
from offload.forecast.planned_trace import check_trace_file, write_planned_trace
from offload.forecast.rates import Rates, rates_of
from offload.forecast.report import as_dict
from pagemem.errors import StorageError

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "byte_gpt.toml"
RATES_GIVEN = ["--flops", "2e9", "--ram-speed", "2000", "--ssd-read", "400", "--ssd-write", "400"]
ARGUMENTS = 'model.arguments={"d_model": 96, "n_layer": 3, "n_head": 4, "seq": 16}'
SMALL = ["--set", ARGUMENTS, "--set", "train.seq=16", "--set", "train.batch=2", "--set", f"memory.page={PAGE_BYTES}"]


def slices(file: Path, category: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X" and event["cat"] == category]


def test_a_limit_on_the_disk_is_one_for_reads_and_writes_together(tmp_path: Path) -> None:
    limited = gpt_config(tmp_path, 2 << 20, ssd={"paths": [str(tmp_path / "pages")], "limit_mb_per_s": 50.0})
    rates = rates_of(limited, flops=2e12, ram=2e12)
    assert rates.ssd_beside == (2.5e7, 2.5e7) and replace(rates, ssd_write=1e7).ssd_beside == (4e7, 1e7)
    assert Rates(1.0, 1.0, 3.0, 4.0).ssd_beside == (3.0, 4.0)
    found = forecast(limited, rates).times
    assert found.read_bytes > 0 < found.written_bytes
    assert found.step_s >= 0.999 * (found.read_bytes + found.written_bytes) / 5e7


def test_tasks_move_what_the_forecast_says_and_ops_wait_as_long(tmp_path: Path) -> None:
    found = forecast(gpt_config(tmp_path, 2 << 20), RATES, explained=True)
    explained = found.explained
    assert explained is not None
    for kind, n_bytes in (("load", found.times.read_bytes), ("store", found.times.written_bytes)):
        moved = sum(task.n_bytes for task in explained.tasks if task.kind == kind and task.moves)
        assert moved / explained.n_steps == pytest.approx(n_bytes)
    assert explained.end_s / explained.n_steps == pytest.approx(found.times.step_s)
    waits_s = sum(wait.end_s - wait.start_s for wait in explained.recording.waits)
    assert waits_s / explained.n_steps == pytest.approx(sum(found.times.waits_s.values()))
    assert sum(task.waits_s for task in explained.tasks) == pytest.approx(waits_s)
    for task in explained.tasks:
        assert task.begin_s <= task.end_s and (
            task.needed_by is None or task.restores or task.trigger <= task.needed_by
        )
    assert "explained" not in as_dict(replace(found, explained=None))
    assert len(as_dict(found)["explained"]["tasks"]) == len(explained.tasks)


def test_rows_name_ops_by_kind_and_number(tmp_path: Path) -> None:
    explained = forecast(gpt_config(tmp_path, 2 << 20), RATES, explained=True).explained
    assert explained is not None
    rows = explained_rows(explained)
    assert len(rows) == len(explained.tasks) and all(len(row) == len(HEADINGS) for row in rows)
    begins = [float(row[0]) for row in rows]
    assert begins == sorted(begins)
    assert not any("update update" in op for op in explained.ops), "the name of an update says what it is"
    needing = {row[7].partition(",")[0] for row in rows} - {"-"}
    assert needing <= {f"{index} {op}" for index, op in enumerate(explained.ops)} | {
        f"{index + len(explained.ops)} {op}" for index, op in enumerate(explained.ops)
    }


def test_copies_to_a_device_are_tasks_of_the_same_plan(tmp_path: Path) -> None:
    memory = {"ram": 2 << 20, "page": PAGE_BYTES, "device": 1 << 20}
    config = gpt_config(tmp_path, 2 << 20, device="cpu-emulated", memory=memory)
    found = forecast(config, RATES, explained=True)
    assert found.explained is not None
    tasks = found.explained.tasks
    assert ("upload", "h2d", "device") in {(task.kind, task.lane, task.tier) for task in tasks}
    file = tmp_path / "both.json"
    write_planned_trace(file, found.explained)
    assert len(slices(file, "upload")) == sum(task.moves for task in tasks if task.kind == "upload")
    assert len(slices(file, "read")) == sum(task.moves for task in tasks if task.kind == "load")


def test_the_command_prints_tasks_and_writes_a_trace_with_the_tracks_of_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "planned.json"
    plan = ["plan", str(EXAMPLE), *SMALL, "--ram", "2MiB", *RATES_GIVEN]
    assert main([*plan, "--explain", "--explain-trace", str(file)]) == 0
    said = capsys.readouterr().out
    assert "plan: a " in said and all(heading in said for heading in HEADINGS)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"steps", "compute", "SSD reads", "SSD writes"} <= names
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"offload, planned"}
    n_loads = len(slices(file, "read"))
    assert n_loads and len(slices(file, "step"))
    assert main([*plan, "--explain-trace", str(file), "--json"]) == 0, "a trace takes an older one's place"
    assert "explained" not in json.loads(capsys.readouterr().out) and len(slices(file, "read")) == n_loads


def test_a_file_that_is_no_trace_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    plan = ["plan", str(EXAMPLE), *SMALL, "--ram", "2MiB", *RATES_GIVEN, "--explain-trace"]
    assert main([*plan, str(notes)]) == 1
    assert f"{notes} is there and is no trace" in capsys.readouterr().err and notes.read_text() == "{}"
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "nowhere.json")
    assert main([*plan, str(link)]) == 1 and "no trace" in capsys.readouterr().err
    assert (
        main([*plan, str(tmp_path / "no folder" / "t.json")]) == 1 and "there is no folder" in capsys.readouterr().err
    )
    (tmp_path / "t.json.new").write_text("mine")
    with pytest.raises(StorageError, match=r"t\.json\.new is there and is no trace"):
        check_trace_file(tmp_path / "t.json")
