"""`offload profile` from configuration to report, beside a run that must not notice."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_content import content
from profile_runs import profile
from rich.console import Console

from examples.byte_gpt import ByteGPT
from offload.cli import main
from offload.config import ConfigError
from offload.config_loading import load_config
from offload.launch.profile_run import temporary_beside
from offload.launch.train import launch
from pagemem.errors import BudgetError, RunDirectoryError

FILES = {"trace.json", "report.html", "summary.json"}


def test_a_run_with_commits_is_left_as_it_is_and_nothing_else_is_left(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(load_config(raw), Console(file=io.StringIO()))
    before = content(tmp_path / "runs")
    assert any("pages" in name for name in before)
    file, to = tmp_path / "run.json", tmp_path / "profile"
    file.write_text(json.dumps(raw))
    capsys.readouterr()
    assert main(["profile", str(file), "--steps", "3", "--set", "ssd.threads=2", "--to", str(to)]) == 0
    assert content(tmp_path / "runs") == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "run.json", "profile"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"pages", "log"}
    assert {path.name for path in to.iterdir()} == FILES
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 steps made; recording 3 more"
    assert re.match(r"steps +3 \(3 by plan, 0 deviations\), \d+\.\d{3} s$", lines[1])
    assert lines[-1] == f"report.html, summary.json and trace.json (for ui.perfetto.dev) are in {to}"
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines[1:-1])
    assert {
        "step, mean against planned",
        "host peak of budget",
        "ssd peak of budget",
        "busy",
        "waiting for pages",
    } <= set(rows)
    assert " of 768.0 KiB: " in rows["host peak of budget"]


def test_where_nothing_is_yet_no_folder_is_made(raw: dict[str, Any], tmp_path: Path) -> None:
    summary, text = profile(raw, tmp_path / "deep" / "profile", terminal=True)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert summary["steps"] == 3 and "Profile" in text and "─" in text


def test_without_an_output_section_and_a_second_time_into_the_same_folder(raw: dict[str, Any], tmp_path: Path) -> None:
    del raw["output"]
    first, _ = profile(raw, tmp_path / "profile", steps=2)
    second, _ = profile(raw, tmp_path / "profile", steps=1)
    assert (first["steps"], second["steps"]) == (2, 1)
    assert json.loads((tmp_path / "profile" / "summary.json").read_text()) == second


def test_steps_that_alternate_are_profiled_by_plans_of_their_own(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"]["factory"] = f"{__name__}:restless"
    summary, text = profile(raw, tmp_path / "profile")
    assert "recording 3 more" in text
    assert summary["planned_steps"] == 3 and summary["deviations"] == 0


class Restless(ByteGPT):
    """Uses one block and two blocks in turn."""

    calls = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """As any byte GPT."""
        self.calls += 1
        blocks, self.blocks = self.blocks, self.blocks[: 1 + self.calls % 2]
        try:
            return super().forward(x, y)
        finally:
            self.blocks = blocks


def restless(**arguments: int) -> torch.nn.Module:
    """The model whose steps differ."""
    return Restless(**arguments, tied=False)


@pytest.mark.parametrize(
    ("steps", "change", "error", "said"),
    [
        (0, {}, ConfigError, "--steps is 0; it must be at least 1"),
        (1, {"train": None, "data": None}, ConfigError, "profile needs the sections data, train as well"),
        (1, {"data": {"factory": "launch_data:no_such"}}, ConfigError, "launch_data:no_such"),
        (1, {"memory": {"ram": "64KiB", "page": "64KiB"}}, BudgetError, "set memory.ram to at least"),
    ],
)
def test_what_cannot_be_profiled_is_one_error_and_leaves_nothing(
    steps: int, change: dict[str, Any], error: type[Exception], said: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        profile(
            {key: value for key, value in {**raw, **change}.items() if value is not None}, tmp_path / "profile", steps
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"profile"}
    assert not list((tmp_path / "profile").glob("*"))


def test_a_folder_of_something_else_is_refused_before_anything_is_built(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "notes.txt").write_text("mine")
    raw["model"]["factory"] = "no_such:model"
    with pytest.raises(RunDirectoryError, match="holds files that are not of a profile; name a new or empty folder"):
        profile(raw, tmp_path / "profile")
    assert (tmp_path / "profile" / "notes.txt").read_text() == "mine"


def test_the_temporary_folder_lies_beside_and_goes_also_after_an_error(tmp_path: Path) -> None:
    for path, parent in ((tmp_path / "pages", tmp_path), (tmp_path / "not" / "there" / "pages", tmp_path)):
        with pytest.raises(KeyboardInterrupt), temporary_beside(path) as folder:
            assert folder.parent == parent and folder.name.startswith(".pages.profile-")
            (folder / "file").write_text("x")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []
