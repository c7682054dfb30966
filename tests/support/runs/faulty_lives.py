"""A small life of a run, of which one call of the system goes wrong: it trains, commits, stops, goes on and exports."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from committed_runs import Run, Setup, assert_same
from counted_calls import Call, CountedCalls, Fault
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import Case
from torch import Tensor, nn

import offload
from offload.checkpoint.verify import verify_run
from pagemem.durable.commit_folder import CommitFolder
from pagemem.folders.folder_lock import holder_of

#: Steps that are compared: three before the run stops, one after, and one more without faults.
FIRST, SECOND, LAST = 3, 4, 5
#: No life takes a tenth of this.
TIMEOUT_S = 60


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


@dataclass
class Told:
    """What a life has heard of its commits, and what is true after each step."""

    durable: int = 0
    begun: int = 0
    named: bool = False
    exported: bool = False
    errors: list[str] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    went_on: tuple[int, dict[str, Any]] | None = None


class Life:
    """One kind of life.

    Args:
        ram: bytes.
        n_paths: folders for page files.
        update: as in a configuration.
        ssd: more of the disk's settings.
    """

    def __init__(
        self, ram: int = 256 << 10, n_paths: int = 1, update: dict[str, Any] | None = None, **ssd: Any
    ) -> None:
        self._ram, self._n_paths, self._update, self._ssd = ram, n_paths, update or {}, ssd

    def can(self, fault: Fault) -> bool:
        """Whether that can be found out: without checksums, a changed bit of a page cannot."""
        return fault is not Fault.FLIPPED or bool(self._ssd.get("checksums", True))

    @contextmanager
    def process(self, folder: Path, seed: int) -> Iterator[Run]:
        """A run that is closed whatever happens; what closing raises counts like any other error."""
        paths = [str(folder / ("pages" if number == 0 else f"pages{number}")) for number in range(self._n_paths)]
        setup = Setup(
            Case(Tiny, "vectors"), self._ram, self._update, more={"ssd": {"paths": paths, "threads": 1, **self._ssd}}
        )
        run = Run(setup, folder, seed=seed, keep=1)
        try:
            yield run
        finally:
            run.engine.close()

    def expected(self, folder: Path) -> Told:
        """What is true after each step of a life without faults."""
        told = Told()
        with self.process(folder, 7) as run:
            for step in range(1, LAST + 1):
                run.step()
                told.states[step] = state(run)
        return told

    def live(self, folder: Path, told: Told) -> None:
        """Two processes. What a commit or an export fails of is noted, and the process goes on; another error ends
        it."""
        with _noted(told), self.process(folder, 7) as run:
            committer = run.engine.debug.committer
            for step in range(1, FIRST + 1):
                run.step()
                with _noted(told):
                    if step == 3:
                        committer.wait()
                        told.durable = 2
                    told.begun = step
                    run.engine.save("best" if step == 1 else None, wait=step != 2)
                    told.durable, told.named = (told.durable if step == 2 else step), told.named or step == 1
        with _noted(told), self.process(folder, 8) as run:
            resumed = run.engine.resume()
            if resumed is None:
                return
            told.went_on = resumed.step, state(run)
            run.train(SECOND)
            with _noted(told):
                told.begun = max(told.begun, SECOND)
                run.engine.save()
                told.durable = SECOND
            with _noted(told):
                run.engine.export(folder / "out")
                told.exported = True

    def trial(self, folder: Path, at: int, fault: Fault, expected: Told) -> Call | None:
        """One life in which call number ``at`` goes wrong, and what it left; returns that call.

        Raises:
            AssertionError: something is not as it should be.
        """
        told, threads, before = Told(), set(threading.enumerate()), descriptors()
        with pytest.MonkeyPatch.context() as patch, in_time(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            calls = CountedCalls(patch, folder, at, fault)
            self.live(folder, told)
        told.errors += [str(warning.message) for warning in warned if isinstance(warning.message, RuntimeWarning)]
        left = [thread.name for thread in threading.enumerate() if thread not in threads]
        assert not left, f"threads are left: {left}"
        assert not descriptors() - before, f"descriptors are left: {descriptors() - before}"
        assert not (folder / "pages").exists() or holder_of(folder / "pages") is None, "the lock is held"
        struck = calls.struck
        _check_errors(told, struck, fault)
        with pytest.MonkeyPatch.context() as patch, in_time():
            CountedCalls(patch, folder)
            self._check_left(folder, told, struck, fault, expected)
        return struck

    def _check_left(self, folder: Path, told: Told, struck: Call | None, fault: Fault, expected: Told) -> None:
        """The last commit is whole, and is gone on from bit by bit; of the export there is all or nothing."""
        spoilt = fault is Fault.FLIPPED and struck is not None and struck.kind in ("pwritev", "pwrite")
        if told.went_on is not None:
            step, there = told.went_on
            assert_same(there, expected.states[step], f"state where it went on after step {step}")
        if CommitFolder(folder / "pages").numbers():
            report = verify_run(folder / "pages", paths=[], commit=None, console=Console(quiet=True))
            assert not report.faults or spoilt, report.faults
        try:
            with self.process(folder, 9) as run:
                resumed = run.engine.resume(allow_older=True)
                step = 0 if resumed is None else resumed.step
                assert spoilt or told.durable <= step <= told.begun, (
                    f"{told.durable} was committed; it goes on from {step}"
                )
                if resumed is not None:
                    assert_same(state(run), expected.states[step], f"state after step {step}")
                    run.train(LAST)
                    assert_same(state(run), expected.states[LAST], "state at the end")
                    run.engine.save()
                if told.named and not spoilt:
                    best = run.engine.resume("best")
                    assert best is not None and best.step == 1
                    assert_same(state(run), expected.states[1], "state of the named commit")
        except (offload.ChecksumError, offload.CommitError):
            if not spoilt:
                raise
        out = folder / "out"
        if told.exported:
            assert_same(load_file(out / "model.safetensors"), expected.states[SECOND]["model"], "export")
        else:
            left = (
                [path.name for path in folder.iterdir() if not path.name.startswith("pages")] if folder.exists() else []
            )
            assert not left, f"of the export is left: {left}"


def state(run: Run) -> dict[str, Any]:
    """What is compared."""
    return {key: value for key, value in run.state().items() if key not in ("numpy", "python", "torch")}


def count(life: Life, folder: Path) -> list[Call]:
    """The calls of a life without faults."""
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, folder)
        told = Told()
        life.live(folder, told)
        assert told.errors == [] and told.exported
    shutil.rmtree(folder)
    return calls.calls


def harmless(call: Call, fault: Fault) -> bool:
    """Whether nobody needs to hear of it: Python's own libraries look paths up, and go on where that fails; and a trial
    of O_DIRECT that moves nothing says that there is none.
    """
    return call.kind in ("lstat", "stat") or (fault is Fault.NOTHING and "probe" in call.path)


def _check_errors(told: Told, struck: Call | None, fault: Fault) -> None:
    assert all(error and "\n" not in error for error in told.errors), told.errors
    if struck is None or harmless(struck, fault) or fault in (Fault.SHORT, Fault.FLIPPED):
        assert fault is not Fault.SHORT or not told.errors, told.errors  # what moves in two parts is whole
        return
    reason = "moved" if fault is Fault.NOTHING else os.strerror(fault.value)
    what = "out" if struck.path.endswith(".unfinished") else Path(struck.path.removesuffix(" (deleted)")).name
    assert any(reason in error and what in error for error in told.errors), f"nobody was told: {told.errors}"
    if struck.kind in ("preadv", "pwritev", "pwrite", "posix_fallocate") and "probe" not in what:
        assert any(reason in error and " at offset " in error for error in told.errors), f"no offset: {told.errors}"


@contextmanager
def _noted(told: Told) -> Iterator[None]:
    try:
        yield
    except offload.OffloadError as error:
        told.errors.append(str(error))


@contextmanager
def in_time() -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"it hangs: {TIMEOUT_S} s are over")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, late)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def descriptors() -> set[tuple[str, str]]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add((entry, os.readlink(f"/proc/self/fd/{entry}")))
        except OSError:  # that of the listing itself
            continue
    return {(entry, target) for entry, target in found if "/proc/" not in target}


def one_thread() -> Iterator[None]:
    """For a fixture: threads cost models this small more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
