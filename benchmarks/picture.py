"""README's table and picture of results, drawn from the newest rows of the CSV: ``python -m benchmarks.picture``.

Both show `benchmarks.step` as it runs by default. The test of this module fails where one of them is not current.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import results_csv
from benchmarks.results_csv import OVER_PLAIN, OVER_SAME_HEAP, Row

ROOT: Final = Path(__file__).resolve().parents[1]
README: Final = ROOT / "README.md"
PICTURE: Final = ROOT / "docs" / "images" / "results.png"
BEGIN: Final = "<!-- results: filled from benchmarks/results by one command, with the picture -->"
END: Final = "<!-- results end -->"
#: From this share of RAM on, all parameters, states and gradients fit.
ALL: Final = 1.5
#: Model and share of RAM of README's rows.
SHOWN: Final = (("27m", 0.25), ("112m", 0.25), ("27m", 1.6), ("112m", 1.6))
#: Options of `benchmarks.step` that do not change what is measured, but how often.
_COUNTS: Final = {"--size", "--ram-share", "--turns", "--turn", "--runs", "--steps"}
OURS_COLOUR, PLAIN_COLOUR, SAME_HEAP_COLOUR = "#1f77b4", "#9e9e9e", "#ff7f0e"


@dataclass(frozen=True, slots=True)
class Result:
    """The newest rows of one model and share of RAM; ``same_heap`` is None where that was not measured."""

    plain: Row
    same_heap: Row | None

    @property
    def model(self) -> str:
        """As README writes it."""
        return f"GPT, {(self.plain.model or '').upper()} parameters"

    @property
    def ram(self) -> str:
        """RAM for parameters and states, of their bytes."""
        share = self.plain.ram_share or 0
        return "all" if share >= ALL else f"{share * 100:g} %"


def newest(rows: Sequence[Row], model: str, ram_share: float, ratio_of: str) -> Row | None:
    """The last row of `benchmarks.step` with a default configuration and batch."""
    found = [
        row
        for row in rows
        if (row.benchmark, row.model, row.ram_share, row.ratio_of, row.batch)
        == ("step", model, ram_share, ratio_of, "4x256")
        and {word for word in shlex.split(row.command) if word.startswith("--")} <= _COUNTS | {"--torch-keeps-heap"}
    ]
    return found[-1] if found else None


def results(rows: Sequence[Row]) -> list[Result]:
    """What README shows.

    Raises:
        ValueError: one of its rows was never measured.
    """
    shown = []
    for model, share in SHOWN:
        plain = newest(rows, model, share, OVER_PLAIN)
        if plain is None:
            raise ValueError(f"no row of benchmarks.step for {model} with a RAM share of {share} in {results_csv.FILE}")
        shown.append(Result(plain, newest(rows, model, share, OVER_SAME_HEAP)))
    return shown


def table(shown: Sequence[Result]) -> str:
    """README's text between the markers."""
    lines = [
        f"![Step time and peak memory beside plain PyTorch]({PICTURE.relative_to(ROOT)})",
        "",
        "| model | RAM for states | step, plain PyTorch = 1 | the same, its heap set as ours | peak memory (plain) |",
        "|---|---|---|---|---|",
    ]
    for result in shown:
        row, same = result.plain, result.same_heap
        ours, plain = ((peak or 0) / 1e9 for peak in (row.peak_rss_bytes, row.other_peak_rss_bytes))
        cells = [result.model, result.ram, f"{row.ratio:.2f}", f"{same.ratio:.2f}" if same else "not measured"]
        lines.append(f"| {' | '.join(cells)} | {ours:.2f} GB ({plain:.2f} GB) |")
    return "\n".join(lines)


def filled(readme: str, text: str) -> str:
    """README with ``text`` between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def digest(shown: Sequence[Result]) -> str:
    """Of the rows that the picture shows; it is kept in the picture's metadata."""
    return hashlib.sha256(repr([(result.plain, result.same_heap) for result in shown]).encode()).hexdigest()[:16]


def draw(shown: Sequence[Result], path: Path) -> None:
    """Ratios with their intervals, and peak memory, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9.6, 2.9), sharey=True, constrained_layout=True)
    for number, result in enumerate(shown):
        for row, colour, shift in ((result.plain, OURS_COLOUR, -0.13), (result.same_heap, SAME_HEAP_COLOUR, 0.13)):
            if row is None or row.ratio is None or row.ratio_low is None or row.ratio_high is None:
                continue
            spread = [[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]]
            time.errorbar(row.ratio, number + shift, xerr=spread, fmt="o", color=colour, capsize=3, markersize=6)
            time.annotate(
                f"{row.ratio:.2f}",
                (row.ratio, number + shift),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        peaks = (result.plain.peak_rss_bytes or 0) / 1e9, (result.plain.other_peak_rss_bytes or 0) / 1e9
        bars = memory.barh([number - 0.18, number + 0.18], peaks, 0.32, color=[OURS_COLOUR, PLAIN_COLOUR])
        memory.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    _label(time, memory, shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": digest(shown), "Software": None})
    pyplot.close(figure)


def _label(time: object, memory: object, shown: Sequence[Result]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    assert isinstance(time, Axes)
    assert isinstance(memory, Axes)
    names = [f"{(r.plain.model or '').upper()}, RAM for {r.ram} of states".replace("all of", "all") for r in shown]
    time.set_yticks(range(len(shown)), names)
    time.set_ylim(len(shown) - 0.4, -0.6)
    time.axvline(1, color=PLAIN_COLOUR, linewidth=1)
    low, high = time.get_xlim()
    time.set_xlim(min(low, 0.9), max(high, 1.2))
    time.set(xlabel="step time, plain PyTorch = 1 (median, 95 % interval)")
    marks = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=label)
        for colour, label in ((OURS_COLOUR, "PyTorch as it is"), (SAME_HEAP_COLOUR, "its heap set as ours"))
    ]
    time.legend(handles=marks, fontsize=8, loc="lower right", frameon=False)
    memory.set(xlabel="peak memory of the process, GB")
    memory.set_xlim(right=memory.get_xlim()[1] * 1.12)
    colours = ((OURS_COLOUR, "offload"), (PLAIN_COLOUR, "plain PyTorch"))
    memory.legend(handles=[Patch(color=c, label=label) for c, label in colours], fontsize=8, frameon=False)
    for axes in (time, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Fill in README and draw."""
    shown = results(results_csv.read())
    README.write_text(filled(README.read_text(), table(shown)))
    draw(shown, PICTURE)


if __name__ == "__main__":
    main()
