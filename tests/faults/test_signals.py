"""Ctrl-C and SIGTERM at random instants: no hang, no signal lost, no wrong exit code, no error of ours, no lock left
behind.

A failing trial names its seed and the seconds after which its signals were sent, and what the run has said.
"""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from signalled_runs import MODES, Outcome, forked, instants, launched, own_loop, warm

Tally = Callable[..., None]
#: Seconds in which a run is built and makes its first steps, on a core that others use as well.
LONGEST_S = 1.2
LONG = 100_000
DONE = "metrics, configuration and loss curve are in"


def stopped(outcome: Outcome, code: int) -> bool:
    """Whether a launched run has ended as it must: stopped, or finished because the signal came too late to stop it."""
    finished = outcome.code == 0 and DONE in outcome.said and "interrupted" not in outcome.said
    return (outcome.code == code or finished) and not outcome.left and "Traceback" not in outcome.said


class Trials:
    """Runs trials and keeps what went wrong."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        warm()
        self._folder, self.seed, self.when = tmp_path, seed, instants(seed, LONGEST_S)
        self.wrong: list[str] = []
        self.codes: Counter[int | None] = Counter()
        self.count = 0

    def make(
        self, run: Callable[[Path], int], signals: list[tuple[int, float]], right: Callable[[Outcome], bool]
    ) -> None:
        """One trial."""
        self.count += 1
        outcome = forked(self._folder / str(self.count), run, signals)
        self.codes[outcome.code] += 1
        if right(outcome):
            shutil.rmtree(outcome.folder)
        else:
            self.wrong.append(
                f"trial {self.count} of seed {self.seed}: exit {outcome.code}, sent {outcome.sent_s}, "
                f"{outcome.left}\n{outcome.said}"
            )

    def end(self, tally: Tally, what: str) -> None:
        """Note the counts and fail where there is something wrong."""
        hangs = self.codes[None]
        tally(
            what,
            trials=self.count,
            failures=len(self.wrong),
            detail=f"{hangs} hangs; exit codes {dict(self.codes)}; seed {self.seed}",
        )
        assert not self.wrong, "\n\n".join(self.wrong[:3])


def own(outcome: Outcome) -> bool:
    return outcome.code == 0 and not outcome.left


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(120)
def test_a_few_of_each(tmp_path: Path, mode: str) -> None:
    trials = Trials(tmp_path, 2)
    for _ in range(3):
        trials.make(own_loop(mode), [(signal.SIGINT, trials.when() / 2)], own)
    assert not trials.wrong, trials.wrong


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(1800)
def test_one_ctrl_c_in_a_loop_of_ones_own(tmp_path: Path, tally: Tally, mode: str) -> None:
    trials = Trials(tmp_path, 11)
    for _ in range(50):
        trials.make(own_loop(mode), [(signal.SIGINT, trials.when())], own)
    trials.end(tally, f"one SIGINT, loop of one's own, then close: {mode}")


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(1800)
def test_one_ctrl_c_under_launch(tmp_path: Path, tally: Tally, mode: str) -> None:
    trials = Trials(tmp_path, 12)
    for number in range(50):
        steps = 4 if number % 4 == 0 else LONG  # some end by themselves meanwhile
        trials.make(
            launched(mode, steps=steps), [(signal.SIGINT, trials.when())], lambda outcome: stopped(outcome, 130)
        )
    trials.end(tally, f"one SIGINT, launch: {mode}")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_several_ctrl_c_under_launch(tmp_path: Path, tally: Tally) -> None:
    trials = Trials(tmp_path, 13)
    for number in range(40):
        mode, more = list(MODES)[number % 4], 1 if number % 8 < 4 else 5
        signals = [(signal.SIGINT, trials.when()), *((signal.SIGINT, trials.when() / 20) for _ in range(more))]
        trials.make(launched(mode, steps=LONG), signals, lambda outcome: stopped(outcome, 130))
    trials.end(tally, "two and six SIGINT, launch")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_sigterm_under_launch(tmp_path: Path, tally: Tally) -> None:
    trials = Trials(tmp_path, 14)

    def committed(outcome: Outcome) -> bool:
        return stopped(outcome, 143) and bool(list((outcome.folder / "pages" / "commits").glob("commit-*.json")))

    for number in range(40):
        mode = list(MODES)[number % 4]
        trials.make(launched(mode, steps=LONG, data="late_text"), [(signal.SIGTERM, trials.when())], committed)
    trials.end(tally, "SIGTERM, launch: stopped and committed")
