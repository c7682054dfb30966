"""The documentation site: builds without a warning, and loads nothing from outside."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_site_builds_strictly_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    check = runpy.run_path(str(ROOT / "docs" / "check_site.py"))["outside_of"]
    assert check(tmp_path) == []
    assert "smallest_budget" in (tmp_path / "api.html").read_text()


def test_what_is_loaded_from_outside_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="https://fonts.example/x.css"><link rel="canonical" href="https://me.example/">'
        '<script src="//cdn.example/a.js"></script><a href="https://elsewhere.example">a link</a><img src="own.png">'
    )
    (tmp_path / "style.css").write_text("a { background: url('https://pictures.example/b.png') } b { src: url(own) }")
    check = runpy.run_path(str(ROOT / "docs" / "check_site.py"))["outside_of"]
    assert check(tmp_path) == [
        "page.html: https://fonts.example/x.css",
        "page.html: //cdn.example/a.js",
        "style.css: https://pictures.example/b.png",
    ]
