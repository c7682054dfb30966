"""What holds for every test: no thread, descriptor or handler of a signal outlives it; hypothesis is reproducible."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tally as tallies
from hypothesis import settings

# Nothing of this machine is measured, and nobody's cache folder read or written.
os.environ["OFFLOAD_CALIBRATION"] = "off"

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("suite")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Descriptors that libraries open once and keep: code and data of installed packages, and the system's own devices.
_KEPT_BY_LIBRARIES = (
    "/site-packages/",
    "/dev/null",
    "/dev/urandom",
    "/dev/random",
    "/proc/",
    "/sys/",
    "/usr/",
    "/lib/",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", type=Path, metavar="FILE", help="append what long tests count to this CSV")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tally")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(tallies.TallyFile(path))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note what a long test counted: ``tally("SIGINT, exact mode, own loop", trials=400, failures=0, detail="3
    lost")``."""

    def note(what: str, *, trials: int, failures: int, detail: str = "") -> None:
        request.node.user_properties.append((tallies.PROPERTY, (what, trials, failures, detail)))

    return note


def pytest_collection_finish() -> None:
    """Leave what imports made out of the collections below, which then take a tenth of the time."""
    gc.collect()
    gc.freeze()


def _collect() -> None:
    """Collect garbage; what is left after a slow collection are late imports, which need not be looked through
    again."""
    started_s = time.perf_counter()
    gc.collect()
    if time.perf_counter() - started_s > 0.008:
        gc.freeze()


def _descriptors() -> set[tuple[str, str]]:
    """What this process has open: number and target, files, pipes, sockets and the kernel's anonymous objects alike."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:  # The descriptor of the listing itself.
            continue
        if not any(part in target for part in _KEPT_BY_LIBRARIES):
            found.add((entry, target))
    return found


def _left_behind(
    threads: set[threading.Thread], descriptors: set[tuple[str, str]]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Threads (with where each is) and descriptors that there are now and were not before."""
    frames, left = sys._current_frames(), []
    for thread in threading.enumerate():
        if thread not in threads:
            frame = frames.get(thread.ident or 0)
            left.append(thread.name + ("" if frame is None else "".join(traceback.format_stack(frame, limit=3))))
    return left, sorted(_descriptors() - descriptors)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test after which a thread runs, a descriptor is open, or a signal is handled, that was not before."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    _collect()
    changed = [number.name for number in _SIGNALS if signal.getsignal(number) != handlers[number]]
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)
    assert not changed, f"handlers of signals left changed: {changed}"
    left, opened = _left_behind(threads, descriptors)
    for _ in range(20):  # A thread may be at its last instruction: what is still there after a second stays.
        if not left and not opened:
            break
        time.sleep(0.05)
        _collect()
        left, opened = _left_behind(threads, descriptors)
    assert not left, f"threads left running: {left}"
    assert not opened, f"descriptors left open: {opened}"
