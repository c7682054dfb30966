"""`offload profile` from configuration to report, beside a run that must not notice, and the report in a real
browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.byte_gpt import ByteGPT
from offload.cli import main
from offload.config import ConfigError, load_config
from offload.launch.profile_run import WARM_UP_STEPS, profile_run, temporary_beside
from offload.launch.train import launch
from offload.profiling.html_report import write_report
from offload.profiling.plain import profile_plain
from pagemem.errors import BudgetError, RunDirectoryError
from pagemem.telemetry.recorder import UNKNOWN_CAUSE, Recorder

MODEL = {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": 32}
FILES = {"trace.json", "report.html", "summary.json"}
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run whose states do not fit in its RAM, with commits, on one compute thread."""
    threads = torch.get_num_threads()
    yield {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "runs" / "pages")], "threads": 1},
        "commit": {"every_steps": 2},
        "model": {"factory": "examples.byte_gpt:byte_gpt", "arguments": MODEL},
        "data": {"factory": "launch_data:sentence_text"},
        "train": {"steps": 4, "batch": 2, "seq": 32, "evaluate_batches": 0, "threads": 1},
        "output": {"run": str(tmp_path / "runs" / "log")},
    }
    torch.set_num_threads(threads)


def profile(raw: dict[str, Any], to: Path, steps: int = 3, *, terminal: bool = False) -> tuple[dict[str, Any], str]:
    """Profile; returns the summary and what was printed."""
    out = io.StringIO()
    summary = profile_run(load_config(raw), steps, to, Console(file=out, force_terminal=terminal, width=200))
    return summary, out.getvalue()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


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
    assert lines[0] == "3 steps until the plan was followed; recording 3 more"
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


def test_steps_that_never_repeat_are_profiled_without_a_plan(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"]["factory"] = f"{__name__}:restless"
    summary, text = profile(raw, tmp_path / "profile")
    assert text.startswith(f"{WARM_UP_STEPS} steps and the plan was not followed yet; recording 3 more")
    assert summary["planned_steps"] == 0


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


# ---- the report in a browser
# -------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: the report is not opened in a real browser"
)


@pytest.fixture
def dom(tmp_path: Path) -> Callable[[Path], str]:
    """The document of a page after its scripts ran."""

    def opened(page: Path) -> str:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return opened


def rows_of(document: str, table: str) -> list[str]:
    """The body rows of a table that the script has filled."""
    found = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', document, re.DOTALL)
    assert found is not None, f"table {table} was not filled"
    return re.findall(r"<tr>.*?</tr>", found[1], re.DOTALL)


@in_a_browser
def test_the_report_draws_itself_in_a_browser(raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]) -> None:
    summary, _ = profile(raw, tmp_path / "profile")
    document = dom(tmp_path / "profile" / "report.html")
    root = re.search(r"<html[^>]*>", document)
    assert root is not None and 'data-rendered="yes"' in root[0] and "data-error" not in root[0]
    assert len(rows_of(document, "peaks")) == len(summary["tiers"]) == 2
    assert len(rows_of(document, "tags")) == sum(len(tier["tag_peaks"]) for tier in summary["tiers"].values())
    assert len(rows_of(document, "plan")) == 3 and len(rows_of(document, "lanes")) == 5
    modules = rows_of(document, "modules")
    assert len(modules) == len(summary["modules"])
    assert all(row["name"] in line for row, line in zip(summary["modules"], modules, strict=True))
    if summary["waits"]:
        waits = rows_of(document, "waits")
        assert len(waits) == len(summary["waits"]) and all(
            w["reason"] in line for w, line in zip(summary["waits"], waits, strict=True)
        )
    else:
        assert "Nobody waited." in document
    if summary["wait_causes"]:
        assert len(rows_of(document, "causes")) == len(summary["wait_causes"])
    else:
        assert "The training thread never waited." in document
    for tier in summary["tiers"].values():
        for tag in tier["tag_peaks"]:
            assert re.search(rf'<path d="M[^"]+Z"[^>]* data-tag="{tag}"', document), tag
    assert (
        document.count('data-lane="') >= 5
        and "NaN" not in document
        and "undefined" not in document.split("<main>")[1].split("<script")[0]
    )
    assert f"{summary['steps']} steps in" in document


@in_a_browser
def test_the_report_of_plain_training_shows_what_there_is_and_nothing_else(
    tmp_path: Path, dom: Callable[[Path], str]
) -> None:
    summary = profile_plain(f"{__name__}:plain_training", 2, tmp_path / "profile", Console(file=io.StringIO()))
    document = dom(tmp_path / "profile" / "report.html")
    root = re.search(r"<html[^>]*>", document)
    assert root is not None and 'data-rendered="yes"' in root[0] and "data-error" not in root[0]
    assert [len(rows_of(document, table)) for table in ("peaks", "modules", "engine")] == [
        1, len(summary["plain"]["modules"]), len(summary["plain"]["engine"]),
    ]  # fmt: skip
    shown = document.split("<main>")[1].split("<script")[0]
    assert (
        not any(heading in shown for heading in ("Plan against reality", "Lanes", "Waits"))
        and "NaN" not in shown
        and "undefined" not in shown
    )
    assert 'data-tag="activation"' in shown and 'data-lane="compute"' in shown


def plain_training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A training without the engine."""
    model = ByteGPT(**MODEL, tied=False)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.zeros(2, MODEL["seq"], dtype=torch.int64)

    def step() -> None:
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


@in_a_browser
def test_pointing_at_the_picture_and_clicking_a_heading(
    raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]
) -> None:
    summary, _ = profile(raw, tmp_path / "profile")
    page = (tmp_path / "profile" / "report.html").read_text()
    acted = tmp_path / "acted.html"
    acted.write_text(
        page.replace(
            "</body>",
            """<script>
        const picture = document.querySelector("svg");
        const box = picture.getBoundingClientRect();
        picture.dispatchEvent(new MouseEvent("mousemove", {
            clientX: box.left + box.width / 2, clientY: box.top + 40
        }));
        [...document.querySelectorAll("#modules th")].find((head) => head.textContent === "parameters").click();
    </script></body>""",
        )
    )
    document = dom(acted)
    tip = re.search(r'<div id="tip" style="display: block;[^>]*>(.*?)</div>', document, re.DOTALL)
    assert (
        tip is not None and all(tier in tip[1] for tier in ("time", "host", "ssd", "parameter")) and "NaN" not in tip[1]
    )
    shown = [
        re.sub(r"<td>(.*?)</td>.*", r"\1", row.removeprefix("<tr>"), flags=re.DOTALL)
        for row in rows_of(document, "modules")
    ]
    n_bytes = {row["name"]: row["parameter_bytes"] for row in summary["modules"]}
    assert [n_bytes[name] for name in shown] == sorted(n_bytes.values(), reverse=True)


@in_a_browser
def test_a_script_error_would_be_seen(raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]) -> None:
    profile(raw, tmp_path / "profile", steps=1)
    page = (tmp_path / "profile" / "report.html").read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r'"tiers":\{"host"', '"tier":{"host"', page, count=1))
    root = re.search(r"<html[^>]*>", dom(broken))
    assert root is not None and "data-error" in root[0] and "data-rendered" not in root[0]


@in_a_browser
def test_names_of_modules_cannot_become_markup(raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]) -> None:
    profile(raw, tmp_path / "profile", steps=1)
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    hostile = "</script><img src=x onerror=document.title='taken'>"
    summary["modules"][0]["name"] = hostile
    recorder = Recorder(lambda _: UNKNOWN_CAUSE)
    write_report(tmp_path / "hostile.html", recorder.finish({}), summary)
    document = dom(tmp_path / "hostile.html")
    assert 'data-rendered="yes"' in document and "<title>Memory profile</title>" in document and "<img" not in document
