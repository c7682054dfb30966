"""Every command and piece of code in the README and in docs/ runs as written, at small size."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import RUN, SHOWN, blocks_of, run_page

from offload import cli
from offload.machine.bench_ssd import BenchPlan, Setting
from pagemem.units import KiB, MiB

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Blocks that are not run, by page; each has its reason in a comment before it.
NOT_RUN: dict[str, int] = {
    "README.md": 2,
    "docs/callbacks.md": 1,
    "docs/hugging_face.md": 1,
    "docs/quick_start.md": 1,
    "docs/ranks.md": 2,
    "docs/three_tiers.md": 1,
    "docs/updates.md": 1,
}

#: Packages that a page is about, which the tests do not need otherwise.
NEEDS: dict[str, str] = {"docs/hugging_face.md": "transformers"}

#: The example's configuration in these tests: the same file with a small model, little text and few steps.
SMALL: dict[str, Any] = {
    "memory": {"ram": "768KiB"},
    "model": {"arguments": {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": 32}},
    "data": {"factory": "launch_data:sentence_text"},
    "train": {"steps": 3, "batch": 2, "seq": 32, "warmup_steps": 1, "evaluate_batches": 1, "threads": 1},
}


def name_of(page: Path) -> str:
    """A page as test ids show it."""
    return page.relative_to(ROOT).as_posix()


def small_toml(path: Path) -> str:
    """A configuration file with the sizes of these tests."""
    content = tomllib.loads(path.read_text())
    for section, values in SMALL.items():
        content[section] |= values
    top = {key: value for key, value in content.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in top.items()]
    for section in content.keys() - top.keys():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in content[section].items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the examples, the one configuration made small, and short measurements of disks."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "examples" / "byte_gpt.toml"
    file.write_text(small_toml(file))
    plan = BenchPlan(4 * MiB, 0.01, (Setting(256 * KiB, 1), Setting(MiB, 2)))
    monkeypatch.setattr(cli, "full_plan", lambda size_bytes, seconds: plan)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    threads, modules = torch.get_num_threads(), set(sys.modules)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_shows_runs(page: Path, small_world: Path) -> None:
    if name_of(page) in NEEDS:
        pytest.importorskip(NEEDS[name_of(page)])
        pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would stay
    run_page(page)


def test_every_block_says_what_it_is() -> None:
    strange = {f"{name_of(page)}:{b.line}" for page in PAGES for b in blocks_of(page) if b.language not in RUN | SHOWN}
    assert strange == set()


def test_what_is_not_run_is_counted() -> None:
    found = Counter(name_of(page) for page in PAGES for block in blocks_of(page) if block.not_run is not None)
    assert found == NOT_RUN


def test_every_page_is_in_the_navigation_and_the_index() -> None:
    index, settings = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in names if f"({name})" not in index or f"- {name}\n" not in settings} == set()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert named - targets == set()


def test_modules_and_files_that_pages_name_exist() -> None:
    lost = set()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        modules = set(re.findall(r"\b(benchmarks(?:\.[a-z]\w*)+)\b(?!/)", text)) - {"benchmarks.md"}
        lost |= {f"{name_of(page)}: {name}" for name in modules if importlib.util.find_spec(name) is None}
        files = re.findall(
            r"(?<![\w/])((?:pagemem|scheduler|optim|offload|tests|examples|benchmarks)/[\w/]+\.\w+)", text
        )
        lost |= {f"{name_of(page)}: {name}" for name in files if not (ROOT / name).exists()}
    assert lost == set()


def test_names_in_the_glossary_are_names_in_the_code() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    named = set(re.findall(r"\| `([A-Za-z_]+)` \|$", glossary, re.MULTILINE))
    code = {
        path: path.read_text()
        for room in ("pagemem", "scheduler", "optim", "offload")
        for path in (ROOT / room).rglob("*.py")
    }
    assert len(named) > 30
    assert {name for name in named if not any(re.search(rf"\b{name}\b", text) for text in code.values())} == set()


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            if "://" in target:
                continue
            if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in _anchors(linked)):
                broken.append(f"{name_of(page)}: {target}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_first_program_of_the_readme_is_short() -> None:
    first = next(block for block in blocks_of(ROOT / "README.md") if block.language == "python")
    code = [line for line in first.code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 15
    assert "load_state_dict" in first.code
