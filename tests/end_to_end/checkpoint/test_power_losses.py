"""Losses of power at random instants of whole runs, metrics and exports included: nothing that was durable is lost, to
the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_runs import SMALL, Run
from crafted_files import settings
from killed_runs import digest, newest_step, shards
from power_loss import Recording

from offload.config_loading import load_config
from offload.console.output import Output
from offload.launch.train import launch

STEPS, HALF = 8, 4
LOSSES = 200


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As `train.threads` may set it for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Ended:
    """What a run has come to."""

    began_at: int = 0
    losses: dict[int, str] = field(default_factory=dict)
    end: str = ""
    exports: dict[str, dict[str, str]] = field(default_factory=dict)


def own_loop(folder: Path, until: int, mark: Callable[[str], None]) -> Ended:
    """A loop of one's own: a commit in the background after every step, one that is waited for, and an export in each
    half."""
    ended = Ended()
    with Run(SMALL, folder / "disk", every_steps=1, keep=2) as run:

        def export_if_due() -> None:
            step = run.engine.steps
            if step in (3, 7) and not (folder / "disk" / f"export-{step}").exists():
                run.engine.export(folder / "disk" / f"export-{step}")
                mark(f"committed {step}")
                mark(f"exported {step}")

        resumed = run.engine.resume()
        ended.began_at = 0 if resumed is None else resumed.step
        export_if_due()
        while run.engine.steps < until:
            run.step()
            step = run.engine.steps
            ended.losses[step] = digest(run.losses[step])
            if step in (2, 6):
                run.engine.save()
                mark(f"committed {step}")
            export_if_due()
        ended.end = digest(run.state())
    mark(f"ended {until}")
    ended.exports = {path.name: shards(path) for path in (folder / "disk").glob("export-*")}
    return ended


def launched(folder: Path, until: int, mark: Callable[[str], None]) -> Ended:
    """`offload launch`, with a commit in the background after every step, and one at its end."""
    ended = Ended(began_at=newest_step(folder / "disk"))
    config = settings(folder / "disk", until)
    assert launch(load_config(config), Output(quiet=True)) == 0
    mark(f"committed {until}")
    mark(f"ended {until}")
    lines = [json.loads(line) for line in (folder / "disk" / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, until + 1)), (
        f"metrics of steps {[line['step'] for line in lines]}"
    )
    ended.losses = {line["step"]: repr(line["loss"]) for line in lines}
    return ended


KINDS: dict[str, Callable[[Path, int, Callable[[str], None]], Ended]] = {"own loop": own_loop, "launch": launched}


class Trial:
    """One kind of run, recorded in two halves (the second goes on from the first), and never interrupted."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root, self._train = kind, root, KINDS[kind]
        (root / "whole").mkdir()
        self.expected = self._train(root / "whole", STEPS, lambda what: None)
        work = root / "recorded"
        (work / "disk").mkdir(parents=True)
        self.recordings = []
        for until in (HALF, STEPS):
            recording = Recording(work / "disk")
            with recording.recording():
                self._train(work, until, recording.mark)
            self.recordings.append(recording)

    def lose(self, draw: random.Random) -> list[str]:
        """One loss of power; everything that is not as it should be afterwards."""
        recording = draw.choice(self.recordings)
        at = draw.randrange(recording.clock + 1)
        folder = self.root / "left"
        folder.mkdir()
        try:
            recording.lose_power(at, draw, folder / "disk")
            return [
                f"{self.kind}, at call {at} of {recording.clock}: {fault}"
                for fault in self._faults(folder, recording, at)
            ]
        finally:
            shutil.rmtree(folder)

    def _faults(self, folder: Path, recording: Recording, at: int) -> Iterator[str]:
        marks = [mark.what.split() for mark in recording.marks if mark.at <= at]
        steps = [
            int(step)
            for what, step in marks
            if what in ("committed", "ended" if self.kind == "launch" else "committed")
        ]
        least = max(
            [
                HALF
                if recording is self.recordings[1] and self.kind == "launch"
                else 3
                if recording is self.recordings[1]
                else 0,
                *steps,
            ]
        )
        try:
            newest = newest_step(folder / "disk")
            if newest < least:
                yield f"step {least} was committed, the newest commit is of step {newest}"
            for what, step in marks:
                if what == "exported" and not (folder / "disk" / f"export-{step}").is_dir():
                    yield f"the export of step {step} is gone"
            for path in (folder / "disk").glob("export-*"):
                if shards(path) != self.expected.exports[path.name]:
                    yield f"{path.name} is not what was exported"
            ended = self._train(folder, STEPS, lambda what: None)
        except Exception as error:  # whatever it is, the run could not go on
            yield f"{type(error).__name__}: {error}"[:400]
            return
        if ended.began_at != newest:
            yield f"the newest commit was of step {newest}, the run went on from {ended.began_at}"
        if (
            any(self.expected.losses[step] != found for step, found in ended.losses.items())
            or ended.end != self.expected.end
        ):
            yield "the run that went on has other bits"
        if ended.exports != self.expected.exports:
            yield "exports differ at the end"


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_losses_of_power(kind: str, tmp_path: Path) -> None:
    trial = Trial(kind, tmp_path)
    draw = random.Random(3)
    faults = [fault for _ in range(4) for fault in trial.lose(draw)]
    assert not faults, "\n".join(faults)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_power(kind: str, tmp_path: Path, tally: Any) -> None:
    trial = Trial(kind, tmp_path)
    draw = random.Random(4)
    faults = [fault for _ in range(LOSSES // len(KINDS)) for fault in trial.lose(draw)]
    calls = sum(recording.clock for recording in trial.recordings)
    tally(
        f"simulated power losses, {kind}",
        trials=LOSSES // len(KINDS),
        failures=len(faults),
        detail=f"at random moments of {calls} recorded calls",
    )
    assert not faults, "\n".join(faults)
