"""The report of a profile in a real browser: it draws itself, says what it is of, and answers pointer and keyboard."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_runs import MODEL, profile
from rich.console import Console

from examples.byte_gpt import ByteGPT
from offload.profiling.html_report import write_report
from offload.profiling.plain import profile_plain
from pagemem.telemetry.recorder import UNKNOWN_CAUSE, Recorder

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


def element(document: str, name: str) -> str:
    """What is inside of an element with an id."""
    found = re.search(rf'<(\w+)[^>]* id="{name}"[^>]*>(.*?)</\1>', document, re.DOTALL)
    assert found is not None, name
    return found[2]


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
    assert f'<h1 id="title">Profile of {raw["output"]["run"]}</h1>' in document and summary["model"] in document
    assert re.sub("<.*?>", "", element(document, "verdict")) == html.escape(summary["bottleneck"], quote=False)
    assert document.count("<details>") == 8 and "<details open" not in document, "tables begin closed"
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
    for tag in summary["tiers"]["host"]["tag_peaks"]:
        assert re.search(rf'<path d="M[^"]+Z"[^>]* data-tag="{tag}"', document), tag
    assert all(re.search(rf'<path d="M[^"]+Z"[^>]* data-rate="{way}"', document) for way in ("up", "down"))
    assert (
        all(f'data-lane="{part}"' in document for part in ("forward", "backward", "update"))
        and "NaN" not in document
        and "undefined" not in document.split("<main>")[1].split("<script")[0]
    )
    assert f"{summary['steps']} steps in" in document
    script = (tmp_path / "profile" / "report.html").read_text()
    light, dark = (set(re.findall(r"--([\w-]+): ", part)) for part in re.findall(r":root \{(.*?)\}", script, re.DOTALL))
    assert light == dark, "every colour has both schemes"


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
        not any(heading in shown for heading in ("Plan and measurement", "Lanes", "Waits"))
        and "NaN" not in shown
        and "undefined" not in shown
    )
    assert 'data-tag="activation"' in shown and 'data-lane="forward"' in shown


def plain_training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A training without the engine."""
    model = ByteGPT(**MODEL, tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
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
        const all = (selector) => [...document.querySelectorAll("#modules " + selector)];
        const names = () => all("tbody tr").map((row) => row.firstChild.textContent);
        const held = all("th button").find((head) => head.textContent === "parameters");
        held.click();
        const down = names();
        held.click();
        document.title = names().reverse().every((name, i) => name === down[i]);
        held.click();
    </script></body>""",
        )
    )
    document = dom(acted)
    tip = re.search(r'<div id="tip" role="status" style="display: block;[^>]*>(.*?)</div>', document, re.DOTALL)
    assert (
        tip is not None
        and all(said in tip[1] for said in ("time", "RAM", "SSD read", "parameter"))
        and "NaN" not in tip[1]
    )
    shown = [
        re.sub(r"<td>(.*?)</td>.*", r"\1", row.removeprefix("<tr>"), flags=re.DOTALL)
        for row in rows_of(document, "modules")
    ]
    assert "<title>true</title>" in document, "a second click turns the order around"
    n_bytes = {row["name"]: row["parameter_bytes"] for row in summary["modules"]}
    assert [n_bytes[name] for name in shown] == sorted(n_bytes.values(), reverse=True)


@in_a_browser
def test_the_picture_is_read_with_the_keyboard(raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]) -> None:
    profile(raw, tmp_path / "profile", steps=1)
    page = (tmp_path / "profile" / "report.html").read_text()
    shown = {}
    for keys in (["End"], ["End", "Home"], ["Home", "ArrowRight", "ArrowRight"], ["Home", "Escape"]):
        presses = "".join(f'press("{key}");' for key in keys)
        acted = tmp_path / "acted.html"
        acted.write_text(
            page.replace(
                "</body>",
                """<script>
        const chart = document.getElementById("chart");
        const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", { key: key }));
        """
                + presses
                + "</script></body>",
            )
        )
        tip = re.search(
            r'<div id="tip"[^>]*style="display: (\w+);[^>]*>.*?<td[^>]*>([^<]*)</td></tr>', dom(acted), re.DOTALL
        )
        assert tip is not None
        shown[keys[-1]] = tip.groups()
    assert shown["Home"] == ("block", "0 \u00b5s") and shown["Escape"][0] == "none"
    assert len({shown[key][1] for key in ("Home", "ArrowRight", "End")}) == 3


@in_a_browser
def test_a_script_error_would_be_seen(raw: dict[str, Any], tmp_path: Path, dom: Callable[[Path], str]) -> None:
    profile(raw, tmp_path / "profile", steps=1)
    page = (tmp_path / "profile" / "report.html").read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace('"tiers":{"host"', '"tier":{"host"', 1))
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
    assert 'data-rendered="yes"' in document and "<title>Profile of " in document and "<img" not in document
