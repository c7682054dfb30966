"""README's results: the table and the picture are those of the newest rows of the CSV."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from PIL import Image

from benchmarks import results_csv
from benchmarks.picture import PICTURE, README, Result, digest, draw, filled, newest, results, table
from benchmarks.results_csv import OVER_PLAIN, OVER_SAME_HEAP, Row

ROW = Row(
    date=datetime.date(2026, 11, 30), commit="7de750db1", machine="CPU", benchmark="step", ratio_of=OVER_PLAIN,
    command="python -m benchmarks.step --size 27m --turns 30", model="27m", batch="4x256", ram_share=0.25, ratio=1.125,
    ratio_low=1.1, ratio_high=1.15, peak_rss_bytes=800_000_000, other_peak_rss_bytes=1_100_000_000,
)  # fmt: skip


def test_readme_is_current() -> None:
    readme = README.read_text()
    assert readme == filled(readme, table(results(results_csv.read()))), "run: python -m benchmarks.picture"


def test_the_picture_is_current() -> None:
    with Image.open(PICTURE) as picture:
        assert picture.info["Description"] == digest(results(results_csv.read())), "run: python -m benchmarks.picture"


def test_the_newest_row_by_default_options_counts() -> None:
    older = dataclasses.replace(ROW, ratio=1.5)
    tuned = dataclasses.replace(ROW, command=ROW.command + " --activations 500MiB")
    small = dataclasses.replace(ROW, batch="1x64")
    same_heap = dataclasses.replace(ROW, ratio_of=OVER_SAME_HEAP)
    rows = [older, ROW, tuned, small, same_heap]
    assert newest(rows, "27m", 0.25, OVER_PLAIN) is ROW
    assert newest(rows, "27m", 0.25, OVER_SAME_HEAP) is same_heap
    assert newest(rows, "112m", 0.25, OVER_PLAIN) is None


def test_a_row_that_was_never_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no row of benchmarks\.step for 112m with a RAM share of 0\.25"):
        results([ROW])


def test_a_row_of_the_table() -> None:
    same_heap = dataclasses.replace(ROW, ratio=1.1875, ram_share=1.6)
    lines = table([Result(ROW, same_heap), Result(same_heap, None)]).splitlines()
    assert lines[-2:] == [
        "| GPT, 27M parameters | 25 % | 1.12 | 1.19 | 0.80 GB (1.10 GB) |",
        "| GPT, 27M parameters | all | 1.19 | not measured | 0.80 GB (1.10 GB) |",
    ]


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match=r"README\.md has no lines"):
        filled("no markers", "")


def test_the_picture_knows_what_it_shows(tmp_path) -> None:
    shown = [Result(ROW, None), Result(dataclasses.replace(ROW, model="112m"), ROW)]
    draw(shown, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.info["Description"] == digest(shown)
        assert picture.size[0] > 1000
    assert digest(shown) != digest(shown[:1])
