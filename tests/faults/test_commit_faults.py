"""Each single call of the disk goes wrong once, in a run that commits: an error or none, and always a commit to go on from.

Whatever the call and whatever goes wrong with it, the run either does what it would have done, or ends with one clear
error; it never hangs; and the next process goes on, bit for bit, from the last commit of which the run had heard that it
is durable, or a later one. Of bytes that reached the disk changed, a checksum must tell before they are trained on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from committed_runs import Run, Setup, assert_same
from counted_calls import Call, CountedCalls, Fault
from tiny_models import Case
from torch import Tensor, nn

import offload

STEPS = 4
CLEAR = offload.OffloadError


class Tiny(nn.Module):
    """Five layers of a page each, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        for layer in self.layers:
            x = x + F.dropout(F.gelu(layer(x)), 0.1)
        return F.cross_entropy(self.norm(x), y)


SETUP = Setup(Case(Tiny, "vectors"), 256 << 10, more={"ssd": {"paths": [], "threads": 1}})


@pytest.fixture(autouse=True, scope="module")
def one_compute_thread() -> Iterator[None]:
    """Threads cost models this small more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def harmless(call: Call, fault: Fault) -> bool:
    """Whether nobody needs to hear of it: Python's own libraries look paths up, and go on where that fails; and a trial of O_DIRECT
    that moves nothing says that there is none.
    """
    return call.kind in ("lstat", "stat") or (fault is Fault.NOTHING and "probe" in call.path)


@dataclass
class Told:
    """What a run has heard of its commits, and what is true after each step."""

    durable: int = 0
    begun: int = 0
    errors: list[Exception] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def process(folder: Path, seed: int) -> Iterator[Run]:
    """A run that is closed whatever happens; what closing raises counts like any other error."""
    setup = Setup(SETUP.case, SETUP.ram, more={"ssd": {"paths": [str(folder / "pages")], "threads": 1}})
    run = Run(setup, folder, seed=seed, keep=1)
    try:
        yield run
    finally:
        run.engine.close()


def state(run: Run) -> dict[str, Any]:
    """What is compared."""
    return {key: value for key, value in run.state().items() if key not in ("numpy", "python", "torch")}


def train(folder: Path, told: Told, *, keep_states: bool = False) -> None:
    """Steps with a commit after each but the last; the second one is made while the third step runs.

    What a commit fails of is noted, and training goes on.
    """
    with process(folder, 7) as run:
        committer = run.engine._checkpoints.committer
        for step in range(1, STEPS + 1):
            run.step()
            if keep_states:
                told.states[step] = state(run)
            try:
                if step == 3:
                    committer.wait()
                    told.durable = 2
                if step < STEPS:
                    told.begun = step
                    run.engine.save(wait=step != 2)
                    told.durable = told.durable if step == 2 else step
            except CLEAR as error:
                told.errors.append(error)


def go_on(folder: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step of the commit it goes on from (0: none), the state there, and at the end."""
    with process(folder, 8) as run:
        resumed = run.engine.resume(allow_older=True)
        there = state(run)
        run.train(STEPS)
        return (0 if resumed is None else resumed.step), there, state(run)


def trial(folder: Path, at: int, fault: Fault, expected: Told) -> str:
    """One run with one fault, and the next without; returns what came of it."""
    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, folder, at, fault)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                train(folder, told)
            except CLEAR as error:
                told.errors.append(error)
        told.errors += [warning.message for warning in warned if isinstance(warning.message, RuntimeWarning)]
        struck = calls.struck
    kind = "none" if struck is None else struck.kind
    damaged_on_disk = fault is Fault.FLIPPED and kind in ("pwritev", "pwrite")
    try:
        with pytest.MonkeyPatch.context() as patch:
            CountedCalls(patch, folder)
            step, there, end = go_on(folder)
    except offload.ChecksumError:
        assert damaged_on_disk and kind == "pwritev"
        return "found when read"
    if not damaged_on_disk:
        assert told.durable <= step <= told.begun
    if step:
        assert_same(there, expected.states[step], f"state after step {step}")
        assert_same(end, expected.states[STEPS], "state at the end")
    assert all(str(error) and "\n" not in str(error) for error in told.errors)
    if fault not in (Fault.SHORT, Fault.FLIPPED) and struck is not None and not harmless(struck, fault):
        assert told.errors, "a call failed and nobody was told"
        reason, what = os.strerror(fault.value) if fault is not Fault.NOTHING else "moved", struck.path.removesuffix(" (deleted)")
        assert any(reason in str(error) and what in str(error) for error in told.errors), [str(error) for error in told.errors]
    return ", ".join(type(error).__name__ for error in told.errors)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, list[Call]]:
    """What happens when nothing goes wrong, and the calls that are made."""
    folder, told = tmp_path_factory.mktemp("expected"), Told()
    train(folder / "alone", told, keep_states=True)
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, folder / "counted")
        train(folder / "counted", Told())
    return told, calls.calls


PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("fault", Fault)
def test_whichever_call_goes_wrong_there_is_a_commit_to_go_on_from(
    fault: Fault, part: int, tmp_path: Path, expected: tuple[Told, list[Call]]
) -> None:
    told, calls = expected
    concerned = [call for call in calls if call.can(fault)]
    outcomes: dict[int, str] = {}
    for at in range(part, len(concerned), PARTS):
        try:
            outcomes[at] = trial(tmp_path / str(at), at, fault, told)
        except BaseException as error:
            error.add_note(f"call {at} of {len(concerned)}, here {concerned[at]}, went wrong: {fault.value}")
            raise
    if fault is Fault.SHORT:
        assert set(outcomes.values()) <= {""}, "what moves in two parts is whole"
