"""Files of a run that are damaged or crafted: one line each, little time and memory, and nothing outside the run is
touched."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crafted_files import CONFIGS, Damage, all_damages, copied, settings, small_model, small_run

import offload
from offload.cli import main
from pagemem.errors import CommitError, OffloadError

MIB = 1 << 20
MOST_BYTES = 50 * MIB
MOST_S = 1.0

#: What may be, in a run that went on without a word: names, dates and keys of others; what the loop at hand does not
#: track; the newest commit is not there, so another is the newest; that no parameter lies in files of others, which
#: commits of earlier versions do not say.
BENIGN = (
    "name is ",
    "created is ",
    "state.versions",
    "state.config",
    "state.given",
    "state.names.",
    "state.lookahead is missing",
    "state.tracked",
    "state.unlike is missing",
    "a state of another kind",
    "state.groups.0 has a key more",
    "state.groups.0.initial_lr is ",
    "missing",
    "files is missing",
    "referenced is missing",
)
#: Of a group, what an optimizer can do without.
BENIGN_KEYS = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    lines: list[str]
    out: str
    cpu_s: float
    peak_bytes: int


def resume(folder: Path) -> int:
    """As a loop of one's own does."""
    with offload.initialize(
        small_model(), {k: v for k, v in settings(folder, 4).items() if k in ("memory", "ssd", "commit")}
    ) as engine:
        assert engine.resume() is not None
    return 0


COMMANDS: dict[str, Callable[[Path, Damage], int]] = {
    "resume": lambda folder, damage: resume(folder),
    "verify": lambda folder, damage: main(["verify", str(folder / "pages")]),
    "export": lambda folder, damage: main(["export", str(folder / "pages"), "--to", str(folder / "out")]),
    "launch": lambda folder, damage: main(
        ["launch", str(folder / (damage.what if damage.what in CONFIGS else "config.toml"))]
    ),
}
READERS = {
    "manifest": ("resume", "verify", "export"),
    "side": ("resume", "verify", "export"),
    "identity": ("resume", "verify", "export"),
    "pages": ("resume", "verify", "export"),
    "lock": ("resume", "verify"),
    "metrics": ("launch",),
    "run identity": ("launch",),
    "config": ("launch",),
}


def attempt(command: str, folder: Path, damage: Damage) -> Outcome:
    """Run a command here; an error that `main` would print is one line as well where the library raises it."""
    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started_s = _status("VmRSS"), time.process_time()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = COMMANDS[command](folder, damage)
        except (OffloadError, ValueError) as error:
            code = 1
            err.write(str(error))
    return Outcome(
        code, err.getvalue().splitlines(), out.getvalue(), time.process_time() - started_s, _status("VmHWM") - before
    )


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) << 10


def faults_of(command: str, damage: Damage, outcome: Outcome) -> list[str]:
    """What is not as it should be."""
    found = []
    said = (
        outcome.lines
        if command != "verify" or outcome.lines
        else [line for line in outcome.out.splitlines() if line.startswith("commit ")][:1]
    )
    if outcome.code not in (0, 1):
        found.append(f"exit code {outcome.code}")
    # A configuration has one line for each thing that is wrong in it.
    if outcome.code == 1 and not 1 <= len(said) <= (25 if damage.file == "config" else 1):
        found.append(f"{len(said)} lines: {said[:3]}")
    if any(len(line) > 1500 or not line.isprintable() for line in said):
        found.append(f"a line that is long or not printable: {said[0][:200]!r}")
    if "Traceback" in outcome.out or any(
        "Traceback" in line or "show where" in line or "shows where" in line for line in outcome.lines
    ):
        found.append(f"an error that nobody expects: {outcome.lines}")
    if outcome.cpu_s > MOST_S and (outcome.code or command != "launch"):
        found.append(f"{outcome.cpu_s:.2f} s")
    if outcome.peak_bytes > MOST_BYTES and (outcome.code or command != "launch"):
        found.append(f"{outcome.peak_bytes / MIB:.0f} MiB")
    return found


def files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that is in a folder."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def benign(damage: Damage) -> bool:
    """Whether a run may go on from it without a word."""
    missing = damage.what in [f"state.groups.0.{key} is missing" for key in BENIGN_KEYS]
    # How torch computes updates is not the commit's to say.
    missing = missing or damage.what.startswith(("state.groups.0.foreach", "state.groups.0.fused"))
    in_a_date = damage.file == "identity" and "flipped" in damage.what and int(damage.what.split()[4]) > 100
    return missing or in_a_date or damage.what.startswith(BENIGN) or damage.file in ("lock", "pages")


class Bench:
    """A run, copied for each damage, beside a folder that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.base, self._work, self._outside = root / "base", root / "work", root / "work" / "outside"
        small_run(self.base)
        self._outside.mkdir(parents=True)
        (self._outside / "file").write_bytes(bytes(1000))
        self.damages = all_damages(self.base)
        self.passed: Counter[str] = Counter()

    def try_one(self, damage: Damage, commands: tuple[str, ...]) -> list[str]:
        """All that goes wrong with it."""
        found, told = [], False
        for command in commands:
            folder = copied(self.base, self._work / "run")
            damage.do(folder)
            before = files(self._outside)
            outcome = attempt(command, folder, damage)
            if outcome.cpu_s > MOST_S:  # once more: other work on the machine slows it down as well
                shutil.rmtree(folder)
                damage.do(copied(self.base, folder))
                outcome = attempt(command, folder, damage)
            faults = faults_of(command, damage, outcome)
            if outcome.code == 0:
                self.passed[f"{command} with {damage.file}"] += 1
                if not told and command == "resume" and not benign(damage):
                    faults.append("nothing was said")
                if told and not (command == "export" and "a newer commit is damaged: " in outcome.out):
                    faults.append("resume calls it damaged, this does not")
            told = told or any("is damaged" in line for line in outcome.lines)
            if files(self._outside) != before:
                faults.append("something outside was touched")
            for name in set(os.listdir(self._work)) - {"run", "outside"}:
                if damage.file != "config":  # which names folders, and may name others
                    faults.append(f"{name} was made outside")
                shutil.rmtree(self._work / name)
            found += [f"{command}, {damage.file}, {damage.what}: {fault}" for fault in faults]
            shutil.rmtree(folder)
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One run for all."""
    root = tmp_path_factory.mktemp("crafted")
    made = Bench(root)
    # What a first call leaves in memory is not the file's.
    for command in COMMANDS:
        attempt(command, copied(made.base, root / "work" / "run"), made.damages[0])
        shutil.rmtree(root / "work" / "run")
    yield made
    shutil.rmtree(root)


def test_a_sample_of_them(bench: Bench) -> None:
    by_file: dict[str, list[Damage]] = {}
    for damage in bench.damages:
        by_file.setdefault(damage.file, []).append(damage)
    sample = [damage for there in by_file.values() for damage in there[:: max(1, len(there) // 6)]]
    assert len(sample) >= 50
    faults = [fault for damage in sample for fault in bench.try_one(damage, READERS[damage.file][:1])]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "what",
    ["a name that clears the screen", "a dtype that is never written", "half a byte", "no elements of 2^63 rows"],
)
def test_a_commit_with_crafted_buffers_is_passed_over_where_an_older_one_may_be_taken(
    what: str, bench: Bench, tmp_path: Path
) -> None:
    (damage,) = (damage for damage in bench.damages if (damage.file, damage.what) == ("side", what))
    folder = copied(bench.base, tmp_path / "run")
    damage.do(folder)
    raw = {key: value for key, value in settings(folder, 4).items() if key in ("memory", "ssd", "commit")}
    with offload.initialize(small_model(), raw) as engine:
        with pytest.raises(CommitError, match=r"\.safetensors is damaged: "):
            engine.resume()
        resumed = engine.resume(allow_older=True)
    assert resumed is not None and resumed.step < 3


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_all_of_them(bench: Bench, tally: Any) -> None:
    failures = [fault for damage in bench.damages for fault in bench.try_one(damage, READERS[damage.file])]
    failures += [
        fault
        for damage in bench.damages[::10]
        if "launch" not in READERS[damage.file]
        for fault in bench.try_one(damage, ("launch",))
    ]
    kinds = Counter(damage.file for damage in bench.damages)
    detail = (
        ", ".join(f"{n} {file}" for file, n in kinds.items())
        + "; passed over: "
        + ", ".join(f"{n} {what}" for what, n in bench.passed.items())
    )
    tally(
        "crafted or damaged files: one line, 1 s, 50 MiB, nothing outside",
        trials=len(bench.damages),
        failures=len(failures),
        detail=detail,
    )
    assert not failures, "\n".join(failures)
