"""The first checks on a GPU, one line each: whether the device's code does on one what it does on the CPU's devices.

    python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --device cpu-emulated --only fork exit

Each check is a process of its own with a time limit, so one that hangs or kills its process costs nothing but its own
line. The exit code is 0 when none failed (what cannot be checked here is skipped), 1 when one did, 2 for a wrong
command line, and 3 where torch finds no CUDA device. What is checked, and what each number is:
`benchmarks.gpu_check.checks`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import common
from benchmarks.common import SIZES
from benchmarks.gpu_check.checks import CHECKS, ROOT, Check
from benchmarks.gpu_check.setting import Outcome, Setting, Status

FAILED: Final = 1
NO_CUDA: Final = 3
RESULTS: Final = ROOT / "benchmarks" / "results"
#: Begins the line by which a check's process answers.
_ANSWER: Final = "outcome: "


@dataclasses.dataclass(frozen=True)
class Line:
    """What there is to say of one check."""

    name: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        said = " ".join(filter(None, (self.outcome.number, f"({self.outcome.detail})" if self.outcome.detail else "")))
        return f"{self.name:<20} {self.outcome.status.value:<8} {self.seconds:7.1f} s  {said}".rstrip()

    def record(self) -> dict[str, Any]:
        """For the file of results."""
        outcome = dataclasses.asdict(self.outcome) | {"status": self.outcome.status.value}
        return {"name": self.name, **outcome, "seconds": round(self.seconds, 3)}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0] if __doc__ else "",
        epilog="checks: " + "; ".join(f"{check.name}: {check.what}" for check in CHECKS),
    )  # fmt: skip
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:N, or cpu-emulated for what can be checked without one (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="these checks only, in the usual order"
    )
    parser.add_argument("--size", choices=SIZES, help="model of the timed steps (default: 357m, without a GPU 27m)")
    parser.add_argument("--dir", help="folder for page files; default: a temporary one")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="FACTOR", help="multiply every time limit (default: %(default)s)"
    )
    parser.add_argument(
        "--save", nargs="?", const="", metavar="FILE", help="keep the results as JSON, by default in benchmarks/results"
    )
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    chosen = parser.parse_args(given)
    kind, _, index = chosen.device.partition(":")
    if chosen.device != "cpu-emulated" and (kind != "cuda" or (index and not index.isdigit())):
        parser.error(f"--device is {chosen.device!r}; it is cuda, cuda:N or cpu-emulated")
    if not chosen.patience > 0:
        parser.error("--patience must be above 0")
    chosen.size = chosen.size or ("27m" if kind == "cpu-emulated" else "357m")
    return chosen


def child(name: str, setting: Setting) -> None:
    """Make one check in this process and answer."""
    check = next(check for check in CHECKS if check.name == name)
    try:
        outcome = check.make(setting)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        outcome = Outcome(Status.FAILED, detail=f"{type(error).__name__}: {lines[0]}")
    print(_ANSWER + json.dumps(dataclasses.asdict(outcome) | {"status": outcome.status.value}), flush=True)
    if check.ends_at_once:
        os._exit(0)


def run(command: Sequence[str], limit_s: float) -> Outcome:
    """What a check's process answers. One that does not in time is killed with all it started; one that dies after its
    answer has failed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        answered = answer_of(output)
        when = "no answer" if answered is None else "answered, but its process did not end"
        return Outcome(Status.FAILED, "" if answered is None else answered.number, f"{when} within {limit_s:g} s")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    answered = answer_of(output)
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    if answered is None:
        return Outcome(Status.FAILED, detail=f"its process ended with {process.returncode} and no answer: {last}")
    if process.returncode:
        return Outcome(
            Status.FAILED,
            answered.number,
            f"answered {answered.status.value}, then its process ended with {process.returncode}: {last}",
        )
    return answered


def answer_of(output: str) -> Outcome | None:
    """The outcome that a check's process printed, if it did."""
    lines = [line for line in output.splitlines() if line.startswith(_ANSWER)]
    if not lines:
        return None
    found = json.loads(lines[-1].removeprefix(_ANSWER))
    return Outcome(Status(found["status"]), found["number"], found["detail"])


def command_of(check: Check, a: argparse.Namespace, folder: Path) -> list[str]:
    """The process of one check."""
    options = ["--device", a.device, "--size", a.size, "--dir", str(folder)]
    return [sys.executable, "-m", "benchmarks.gpu_check", "--child", check.name, *options]


def make_all(a: argparse.Namespace) -> list[Line]:
    """Every check that was asked for, a line printed for each as soon as it is made."""
    lines = []
    emulated = a.device == "cpu-emulated"
    for check in CHECKS:
        if a.only and check.name not in a.only:
            continue
        started_s = time.perf_counter()
        if emulated and check.needs_gpu:
            outcome = Outcome(Status.SKIPPED, detail="needs a GPU")
        else:
            with tempfile.TemporaryDirectory(dir=a.dir, prefix="gpu-check-") as folder:
                outcome = run(command_of(check, a, Path(folder).absolute()), check.limit_s * a.patience)
        lines.append(Line(check.name, outcome, time.perf_counter() - started_s))
        print(lines[-1], flush=True)
    return lines


def save(lines: Sequence[Line], a: argparse.Namespace) -> Path:
    """Keep the results; returns where."""
    path = Path(a.save) if a.save else RESULTS / f"gpu-check-{datetime.date.today().isoformat()}.json"
    record = {
        "benchmark": "gpu_check",
        "device": a.device,
        "surroundings": common.surroundings(),
        "checks": [line.record() for line in lines],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def main(given: Sequence[str] | None = None) -> int:
    """Check and print; returns the exit code."""
    a = arguments(given)
    if a.child:
        child(a.child, Setting(a.device, Path(a.dir), a.size))
        return 0
    if a.device != "cpu-emulated" and not torch.cuda.is_available():
        build = (
            "this torch is a build without CUDA"
            if torch.version.cuda is None
            else "torch finds no device that it can use"
        )
        print(
            f"no GPU to check: {build} (--device cpu-emulated checks what can be checked without one)", file=sys.stderr
        )
        return NO_CUDA
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # or the check under way would go on alone
    try:
        lines = make_all(a)
    finally:
        signal.signal(signal.SIGTERM, before)
    if a.save is not None:
        print(f"results are in {save(lines, a)}")
    return FAILED if any(line.outcome.status is Status.FAILED for line in lines) else 0
