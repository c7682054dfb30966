"""Runs that are killed again and again at random instants: a process that has imported everything forks each run and
kills it.

    python killed_runs.py KIND KILLS SEED FOLDER

prints one JSON object. Nothing that starts a thread may be called before the fork, so whatever trains or compares runs
in a child.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from committed_runs import LOCK_FREE, MIB, RANDOM, SMALL, Run, Setup
from crafted_files import settings
from torch import Tensor

from offload.cli import main
from offload.commits.commit_state import read_commit
from offload.config_loading import load_config
from offload.console.output import Output
from offload.launch.train import launch
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError

STEPS = 10
EXPORTS = (4, 8)
SETUPS: dict[str, Setup] = {
    "exact": SMALL,
    "lock-free": Setup(RANDOM, 4 * MIB, {"mode": "lock-free", "max_staleness": 4, "exact_steps": 0}),
    "lock-free, staleness 0": Setup(RANDOM, 4 * MIB, LOCK_FREE),
}


@dataclass
class Told:
    """What children said, over all of a run's parts."""

    losses: dict[int, str] = field(default_factory=dict)
    committed: int = 0
    resumed: list[int] = field(default_factory=list)
    end: str = ""
    wrong: list[str] = field(default_factory=list)


# ---- children -------------------------------------------------------------------------------------------------------


def own_loop(kind: str, folder: Path, say: Callable[[str], None]) -> None:
    """A loop of one's own: commits in the background after every step, one with a name, and two exports."""
    with Run(SETUPS[kind], folder, every_steps=1, keep=2) as run:

        def export_if_due() -> None:
            step = run.engine.steps
            if step in EXPORTS and not (folder / f"export-{step}").exists():
                run.engine.export(folder / f"export-{step}")
                say(f"committed {step}")

        resumed = run.engine.resume()
        say(f"resumed {0 if resumed is None else resumed.step}")
        export_if_due()
        while run.engine.steps < STEPS:
            run.step()
            step = run.engine.steps
            say(f"loss {step} {digest(run.losses[step])}")
            if step == 6:
                run.engine.save("named")
                say(f"committed {step}")
            export_if_due()
        say(f"end {digest(run.state())}")


def launched(folder: Path, say: Callable[[str], None]) -> None:
    """`offload launch`, with a commit in the background after every step."""
    with open(folder / "said.txt", "w") as file:
        code = launch(load_config(settings(folder, STEPS)), Output(file=file, width=200))
    lines = [
        line
        for line in (folder / "said.txt").read_text().splitlines()
        if "resumes after step" in line or "finished: the newest commit" in line
    ]
    say(f"end {code} {lines[0] if lines else 'from the beginning'}")


def exported(folder: Path, say: Callable[[str], None]) -> None:
    """`offload export` of a run that has ended."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    say(f"end {main(['export', str(folder / 'pages'), '--to', str(folder / 'weights')])}")


def digest(value: Any) -> str:
    """Of all bits of a state."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(
                f"{value.dtype} {list(value.shape)}".encode()
                + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, dict):
            for key, inner in value.items():
                found.update(repr(key).encode())
                take(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                take(inner)
        else:
            found.update(repr(value).encode())

    take(value)
    return found.hexdigest()[:24]


def forked(
    child: Callable[[Callable[[str], None]], None], kill_after_s: float | None
) -> tuple[int | None, list[str], float]:
    """Run ``child`` in a fork, and kill it after a time; returns its exit code, None if it was killed, what it said,
    and its seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            torch.set_num_threads(1)
            child(lambda line: os.write(write, (line + "\n").encode()) and None)
            code = 0
        except BaseException:
            os.write(write, ("error " + traceback.format_exc().replace("\n", " | ") + "\n").encode())
        finally:
            os._exit(code)
    os.close(write)
    started_s = time.monotonic()
    if kill_after_s is not None:
        while time.monotonic() - started_s < kill_after_s:
            time.sleep(max(0.0, min(0.002, started_s + kill_after_s - time.monotonic())))
        os.kill(pid, signal.SIGKILL)
    said = b""
    while part := os.read(read, 65536):
        said += part
    os.close(read)
    _, status = os.waitpid(pid, 0)
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    return code, said.decode().splitlines(), time.monotonic() - started_s


# ---- the parent -----------------------------------------------------------------------------------------------------


def newest_step(folder: Path) -> int:
    """The step of the newest commit; every manifest there is must be whole."""
    commits = CommitFolder(folder / "pages")
    return max([0, *(read_commit(commits, number).step for number in commits.numbers())])


def shards(folder: Path) -> dict[str, str]:
    """Digests of the tensors of an export, which must have an index that fits."""
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files)
    return files


def note(lines: list[str], told: Told, *, bits: bool = True) -> None:
    """Take in what a child said; with ``bits`` a step that is made again must have the same loss."""
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "resumed":
            told.resumed.append(int(rest))
        elif word == "committed":
            told.committed = max(told.committed, int(rest))
        elif word == "loss":
            step, found = rest.split()
            if told.losses.setdefault(int(step), found) != found and bits:
                told.wrong.append(f"step {step} had another loss when it was made again")
        elif word == "end":
            told.end = rest
        elif word == "error":
            told.wrong.append(rest[-600:])


class Campaign:
    """Kills of one kind, over as many runs as they take, each of which must end as the one that was never killed.

    Attributes:
        failures: what was lost or differed. counts: kills and runs.
    """

    def __init__(self, kind: str, seed: int, root: Path) -> None:
        self.kind, self.root, self.draw = kind, root, random.Random(seed)
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.bits = kind != "lock-free"
        whole = root / "whole"
        whole.mkdir()
        self.expected = Told()
        code, said, self.seconds = forked(self._child(whole), None)
        note(said, self.expected)
        assert code == 0, said
        self.expected_exports = self._exports(whole)
        self.expected_losses = self._metrics(whole)

    def _child(self, folder: Path) -> Callable[[Callable[[str], None]], None]:
        if self.kind == "launch":
            return lambda say: launched(folder, say)
        return lambda say: own_loop(self.kind, folder, say)

    def _exports(self, folder: Path) -> dict[str, dict[str, str]]:
        if self.kind == "launch" and not (folder / "weights").exists() and newest_step(folder) == STEPS:
            _, said, self.export_seconds = forked(lambda say: exported(folder, say), None)
            assert said == ["end 0"], said
        return {path.name: shards(path) for path in folder.iterdir() if path.name.startswith(("export-", "weights"))}

    def _metrics(self, folder: Path) -> list[float]:
        if self.kind != "launch":
            return []
        lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), (
            f"metrics of steps {[line['step'] for line in lines]}"
        )
        return [line["loss"] for line in lines]

    def run(self, kills: int) -> None:
        """Kill so often."""
        while self.counts["kills"] < kills and len(self.failures) < 20:
            folder = self.root / "run"
            folder.mkdir()
            self._one_run(folder, kills)
            shutil.rmtree(folder)

    def _one_run(self, folder: Path, kills: int) -> None:
        told = Told()
        child = self._child(folder)
        newest = 0
        steps = []
        for part in range(40):
            # Where other work on the machine makes starting take most of the time, a run needs some part that is not
            # killed.
            after_s = (
                self.draw.uniform(0, 1.05 * self.seconds) if self.counts["kills"] < kills and part % 20 < 19 else None
            )
            code, said, _ = forked(child, after_s)
            before = len(told.resumed)
            note(said, told, bits=self.bits)
            if len(told.resumed) > before and told.resumed[-1] != newest:
                told.wrong.append(f"the newest commit was of step {newest}, the run went on from {told.resumed[-1]}")
            if self.kind == "launch" and code == 0 and newest and f"step {newest}" not in told.end:
                told.wrong.append(f"the newest commit was of step {newest}: {told.end}")
            if code == 0 or told.wrong:
                break
            if code is not None:
                told.wrong.append(f"exit code {code}")
                break
            self.counts["kills"] += 1
            try:
                newest = newest_step(folder)
                steps.append(newest)
            except CommitError as error:
                told.wrong.append(str(error))
                break
            if newest < told.committed:
                told.wrong.append(f"step {told.committed} was committed, the newest commit is of {newest}")
            found = self._exports(folder) if self.kind != "launch" else {}
            if self.bits and any(self.expected_exports[name] != files for name, files in found.items()):
                told.wrong.append("an export differs")
        else:
            told.wrong.append(f"it did not come to an end; newest commits were of steps {steps}")
        self.counts["runs"] += 1
        if not told.wrong:
            self._compare(folder, told, kills)
        self.failures += [f"{self.kind}, after {self.counts['kills']} kills: {what}" for what in told.wrong]

    def _compare(self, folder: Path, told: Told, kills: int) -> None:
        try:
            if self.kind == "launch":
                if self._metrics(folder) != self.expected_losses:
                    told.wrong.append("metrics differ")
                self._kill_exports(folder, told, kills)
            if self.bits and self._exports(folder) != self.expected_exports:
                told.wrong.append("exports differ at the end")
        except (AssertionError, OSError, ValueError) as error:
            told.wrong.append(str(error)[:300])
        if self.bits and self.kind != "launch" and (told.end, told.losses) != (self.expected.end, self.expected.losses):
            told.wrong.append("the state at the end differs")

    def _kill_exports(self, folder: Path, told: Told, kills: int) -> None:
        """Of the run that has ended: an export is there whole or not at all."""
        while self.counts["kills"] < kills:
            code, _, _ = forked(lambda say: exported(folder, say), self.draw.uniform(0, 1.05 * self.export_seconds))
            if code is not None:
                break
            self.counts["kills"] += 1
            self.counts["of an export"] += 1
            if (folder / "weights").exists():
                if shards(folder / "weights") != self.expected_exports["weights"]:
                    told.wrong.append("a killed export left other weights")
                break


if __name__ == "__main__":
    kind_, kills_, seed_, root_ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    campaign = Campaign(kind_, seed_, root_)
    campaign.run(kills_)
    print(json.dumps({"counts": campaign.counts, "failures": campaign.failures, "seconds": campaign.seconds}))
