"""Profiling some steps of a running engine: what `Engine.profile` returns.

Nothing that the engine computes depends on it: it is told what happens, and asks nothing of the engine but sizes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from torch import nn

from offload.config import ConfigError
from offload.profiling.html_report import write_report
from offload.profiling.perfetto import write_trace
from offload.profiling.stats import MemoryReport, Stats, planned_step_s
from offload.profiling.summary import FORMAT, Context, ModuleBytes, summarize
from offload.store.page_store import PageStore
from pagemem.errors import RunDirectoryError, StorageError
from pagemem.folders.own_file import draft_of, make_folder, remove_draft, replace_file
from pagemem.folders.small_file import read_small
from pagemem.process.wait_lock import LockUse, WaitLock, counted
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import Recorder, Recording
from pagemem.tier import Tag, Tier
from pagemem.units import MiB

TRACE: Final = "trace.json"
REPORT: Final = "report.html"
SUMMARY: Final = "summary.json"
_FILES: Final = (TRACE, REPORT, SUMMARY)
#: Said once the files are written.
WRITTEN: Final = f"{REPORT}, {SUMMARY} and {TRACE} (for ui.perfetto.dev) are in"


def check_steps(steps: int) -> None:
    """Refuse to record no steps.

    Raises:
        ConfigError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; it must be at least 1")


def open_profile_folder(folder: Path) -> None:
    """Have a folder for a profile: new, empty, or of an earlier profile, which is removed.

    Raises:
        RunDirectoryError: it holds something else, or cannot be made; nothing in it was changed.
    """
    check_profile_folder(folder)
    try:
        make_folder(folder)
        for name in sorted(os.listdir(folder)):
            remove_draft(folder / name)
    except (OSError, StorageError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunDirectoryError(f"{folder} cannot be used for a profile: {why}") from error


def check_profile_folder(folder: Path) -> None:
    """Before there is anything to write: whether `open_profile_folder` can open a folder. Nothing is changed.

    Raises:
        RunDirectoryError: it cannot.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not os.path.isdir(existing):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        found = set(os.listdir(folder)) if existing == folder.absolute() else set()
        ours = {*_FILES, *(draft_of(Path(name)).name for name in _FILES)}
        if found and (found - ours or SUMMARY not in found or not _is_profile(folder / SUMMARY)):
            raise RunDirectoryError(f"{folder} holds files that are not of a profile; name a new or empty folder")
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be used for a profile: {error.strerror}") from error


def _is_profile(path: Path) -> bool:
    try:
        loaded = json.loads(read_small(path, 64 * MiB))
    except ValueError:
        return False
    return isinstance(loaded, dict) and loaded.get("format") == FORMAT


def write_profile(folder: Path, recording: Recording, summary: dict[str, Any]) -> None:
    """Write a profile's files into a folder that `open_profile_folder` has opened."""
    # First what says that the folder is a profile's: it can be used again even if the others do not come about.
    replace_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    write_trace(folder / TRACE, recording)
    write_report(folder / REPORT, recording, summary)


class Profile:
    """Records from its beginning as a context manager to its end, then writes trace, report and summary. Training
    thread only; used once.

    Args:
        folder: for the files.
        title: of the report; by default ``output.run``, or the name of the model's class.
        stats, memory_report: the engine's own. locks: those that its steps take.

    Attributes:
        recording, summary: what was recorded and what it says, once the block has ended well.
    """

    def __init__(
        self,
        folder: str | Path,
        title: str | None,
        model: nn.Module,
        store: PageStore,
        stats: Callable[[], Stats],
        memory_report: Callable[[], MemoryReport],
        locks: Sequence[WaitLock],
    ) -> None:
        self.folder = Path(folder)
        self.recording: Recording | None = None
        self.summary: dict[str, Any] = {}
        self._title = title
        self._model = model
        self._store = store
        self._stats = stats
        self._memory_report = memory_report
        self._recorder: Recorder | None = None
        self._counting = counted(*locks)
        self._lock_use: Mapping[str, LockUse] = {}

    def __enter__(self) -> Profile:
        """Begin to record.

        Raises:
            RunDirectoryError: the folder holds something else than a profile. RuntimeError: somebody profiles already,
                or this object has been used. Nothing was changed.
        """
        if self._store.driver.watcher is not None:
            raise RuntimeError("this engine is being profiled already; end that profile first")
        if self._recorder is not None:
            raise RuntimeError("a profile is used once; call engine.profile() again")
        open_profile_folder(self.folder)
        self._begun = self._stats()
        self._recorder = Recorder(self._store.driver.memories.causes())
        self._onward = self._store.counters.onward
        self._held = attach(self._store, self._recorder, self._recorder)
        self._lock_use = self._counting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counting.__exit__(None, None, None)
        attach(self._store, None, self._onward)
        if error is None:
            assert self._recorder is not None
            self.recording = self._recorder.finish(self._held)
            self.summary = summarize(self.recording, self._context())
            write_profile(self.folder, self.recording, self.summary)

    def _context(self) -> Context:
        store, since = self._store, self._stats().since(self._begun)
        plan, config = store.driver.follower.plan, store.config
        title = self._title or (config.output.run if config.output is not None else type(self._model).__name__)
        planned = (
            None
            if plan is None
            else {
                "step_s": planned_step_s(store),
                "read_bytes": plan.read_bytes / plan.n_steps,
                "written_bytes": plan.written_bytes / plan.n_steps,
            }
        )
        activations = frozenset(tensor.name for tensor in store.mover.tensors.values() if tensor.tag is Tag.ACTIVATION)
        return Context(
            title, model_name(self._model), config.update.mode, store.page_bytes, self._memory_report().tiers, planned,
            modules_of(store), activations, since.planned_steps, since.deviations, config.ssd.limit_mb_per_s,
            self._lock_use,
        )  # fmt: skip


def model_name(model: nn.Module) -> str:
    """The class of a model and how many parameters it has."""
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


def attach(store: PageStore, watcher: Recorder | None, onward: EventSink) -> Mapping[tuple[Tier, Tag], int]:
    """Tell ``watcher`` (None: nobody) and ``onward`` what happens in a store from now on; returns bytes held at that
    moment.

    In host memory that is whole pages of the arena, and what is reserved outside of it.
    """
    store.binder.bindings.let_go()  # What is bound between uses is an op of nobody.
    with ExitStack() as locks:
        device = store.device_tier
        if device is not None:
            locks.enter_context(device.mover.changed)  # taken before the one below, everywhere
        locks.enter_context(store.mover.changed)
        held = store.mover.watch(watcher)
        if device is not None:
            held |= device.mover.watch(watcher)
        for tag, n_bytes in store.budget.watch(watcher).items():
            # The arena itself is reserved whole; what it holds is counted page by page.
            outside = n_bytes - store.mover.arena.n_bytes if tag is Tag.STAGING else n_bytes
            held[Tier.HOST, tag] = held.get((Tier.HOST, tag), 0) + outside
        store.driver.watcher = watcher
        store.counters.onward = onward
    return held


def modules_of(store: PageStore) -> list[ModuleBytes]:
    """Every unit of the model."""
    found = []
    for unit in store.index.units:
        held = {
            "parameter_bytes": [unit.parameters],
            "master_bytes": [part.master for part in unit.slices if part.master is not None],
            "moment_bytes": [part.states for part in unit.slices if part.states is not None],
        }
        tensors = [*(tensor for several in held.values() for tensor in several), *filter(None, [unit.gradients])]
        sums = {what: sum(tensor.n_bytes for tensor in several) for what, several in held.items()}
        found.append(ModuleBytes(unit.name, sums, [tensor.name for tensor in tensors]))
    return found
