"""Measured processes that step in turns, and their times turn by turn.

The first step of a turn is not timed: what the others left to the disk, and what was read while they computed, falls
there, so that no process's I/O hides in another's step. Who begins changes from turn to turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

LEAST: Final = 5
#: Steps of a turn that are not timed.
LEAD: Final = 1

Step = dict[str, Any]


class Stepping(Protocol):
    """A measured process, seen from the measuring one."""

    def step(self) -> Step:
        """Have it make a step; returns what that took and moved."""


@dataclass(frozen=True)
class Turns:
    """Steps by the name of their process, turn by turn."""

    steps: dict[str, list[list[Step]]]

    def all(self, name: str) -> list[Step]:
        """Every step."""
        return [step for turn in self.steps[name] for step in turn]

    def timed(self, name: str) -> list[Step]:
        """Every timed step."""
        return [step for turn in self.steps[name] for step in turn[LEAD:]]

    def mean_s(self, name: str) -> list[float]:
        """Mean seconds of a timed step, turn by turn."""
        return [statistics.mean(step["step_s"] for step in turn[LEAD:]) for turn in self.steps[name]]

    def ratios(self, ours: str, other: str) -> list[float]:
        """One's time over another's, turn by turn."""
        return [one / two for one, two in zip(self.mean_s(ours), self.mean_s(other), strict=True)]


def take(processes: Mapping[str, Stepping], n_turns: int, n_steps: int, title: str = "") -> Turns:
    """Have each process make ``n_steps`` steps in each of ``n_turns`` turns; says on stderr what each turn took."""
    names = list(processes)
    steps: dict[str, list[list[Step]]] = {name: [] for name in names}
    for number in range(n_turns):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            steps[name].append([processes[name].step() for _ in range(n_steps)])
        made = Turns({name: turns[-1:] for name, turns in steps.items()})
        times = (f"{name} {made.mean_s(name)[0]:.3f} s" for name in names)
        print(f"{title}turn {number + 1}/{n_turns}:", *times, file=sys.stderr, flush=True)
    return Turns(steps)


def add_arguments(parser: argparse.ArgumentParser, n_turns: int) -> None:
    """``--turns`` and ``--turn``."""
    parser.add_argument("--turns", type=int, default=n_turns, help="paired turns (default: %(default)s)")
    parser.add_argument(
        "--turn", type=int, default=LEAST, help="steps of a turn, the first not timed (default: %(default)s)"
    )


def check_arguments(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """End with an error where turns are too few or too short."""
    if a.turns < 1:
        parser.error(f"--turns is {a.turns}; at least 1")
    if a.turn < LEAST:
        parser.error(f"--turn is {a.turn}; below {LEAST} one side's I/O goes on in another's steps")
