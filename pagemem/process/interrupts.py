"""Ctrl-C while an engine is alive: KeyboardInterrupt is raised in the caller's code, not in the middle of ours.

Python runs a signal's handler between any two instructions of the main thread, also where bookkeeping of ours is half
done, or in a callback whose exceptions nobody sees. So the handler looks at the frames that it has interrupted. Where
none is of a package that is covered, it raises at once, as Python's own does. Otherwise the exception waits until the
outermost frame of ours has returned, and is raised in its caller, by way of a trace function that the caller's frame
has until then. Nothing is looked at where no signal comes.

Functions that run code of others for long, and in which an exception does no harm, can be left open.

Handlers of others are left alone; an exception of theirs comes wherever it comes. The same holds for all of this while
a debugger or another tool traces the main thread. Main thread, but where a function says otherwise.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, TypeVar

#: A signal that comes so long after one that waits is raised where it is: our code may be waiting for what never comes.
IMPATIENT_AFTER_S: Final = 5.0

Function = TypeVar("Function", bound=Callable[..., Any])

#: Folders of the packages that are covered, each with a "/" at its end.
_packages: tuple[str, ...] = (f"{Path(__file__).parents[1]}/",)
_open_files: set[str] = set()
_open_functions: set[CodeType] = set()
_lock = threading.Lock()
_guards: set[int] = set()


def cover(package_file: str, open_files: Iterable[str] = ()) -> None:
    """Have the code below a package's folder return before an interrupt is raised.

    Args:
        package_file: ``__file__`` of the package, or of a module in its folder.
        open_files: paths below the folder of modules that are the callers of the rest.
    """
    global _packages
    folder = Path(package_file).parent
    _packages = tuple(dict.fromkeys((*_packages, f"{folder}/")))
    _open_files.update(str(folder / path) for path in open_files)


def left_open(function: Function) -> Function:
    """A function of a covered package that may be interrupted, unless one that may not is around it or called by it."""
    _open_functions.add(function.__code__)
    return function


# ---- the exception that waits --------------------------------------------------------------------------------------


class _Waiting:
    """An exception that is to be raised in ``target``, the frame that has called our code."""

    def __init__(self, error: Callable[[], BaseException], target: FrameType) -> None:
        self.error = error
        self.since_s = time.monotonic()
        self.target = target

    def arm(self) -> None:
        """Have the target's next instruction raise it."""
        self.target.f_trace = self.trace
        self.target.f_trace_lines, self.target.f_trace_opcodes = False, True
        sys.settrace(_trace_nothing)

    def disarm(self) -> None:
        """Nothing is raised any more."""
        if sys.gettrace() is _trace_nothing:
            sys.settrace(None)
        self.target.f_trace = None
        self.target.f_trace_lines, self.target.f_trace_opcodes = True, False

    def trace(self, frame: FrameType, event: str, arg: Any) -> None:
        """Called in the target before its next instruction, or when an exception comes out of our code into it."""
        error = _take()
        if error is None:
            return
        if event == "exception":
            error.__context__ = arg[1] if isinstance(arg[1], BaseException) else None
        raise error


_waiting: _Waiting | None = None


def _trace_nothing(frame: FrameType, event: str, arg: Any) -> None:
    """No frame is traced but the one that has a function of its own."""


def _take() -> BaseException | None:
    """The exception that waits, which does not any more."""
    global _waiting
    waiting, _waiting = _waiting, None
    if waiting is None:
        return None
    waiting.disarm()
    return waiting.error()


def raise_outside(frame: FrameType | None, error: Callable[[], BaseException] = KeyboardInterrupt) -> None:
    """Raise ``error()`` now if ``frame``, which a signal has interrupted, and its callers are none of ours; else once
    they have returned.

    Where nobody guards anything it is raised now in any case.

    Signals that come while one waits are one with it, as they are where the system has them wait; but see
    `IMPATIENT_AFTER_S`.
    """
    global _waiting
    target = _caller(frame) if _guards else None
    if target is None or (_waiting is not None and time.monotonic() - _waiting.since_s > IMPATIENT_AFTER_S):
        waiting, _waiting = _waiting, None
        if waiting is not None:
            waiting.disarm()
        raise error()
    if _waiting is None:
        _waiting = _Waiting(error, target)
    if sys.gettrace() is not _trace_nothing:
        _waiting.arm()


def check() -> None:
    """Raise the interrupt that waits, if one does: where code of ours is ready for it. Any thread; it is the main
    thread's alone."""
    if _waiting is not None and threading.current_thread() is threading.main_thread():
        error = _take()
        if error is not None:
            raise error


def _caller(frame: FrameType | None) -> FrameType | None:
    """Who has called the outermost frame of ours, of those that have called ``frame``; None: there is none of ours."""
    if sys.gettrace() not in (None, _trace_nothing):
        return None
    outermost = None
    while frame is not None:
        if _is_covered(frame.f_code) or _begins_ours(frame):
            outermost = frame
        frame = frame.f_back
    if outermost is None:
        return None
    target = outermost.f_back
    # A with statement over a generator of ours: its block must have been entered, or left, before.
    while target is not None and target.f_code.co_filename == contextlib.__file__:
        target = target.f_back
    return target


def _is_covered(code: CodeType) -> bool:
    path = code.co_filename
    return path.startswith(_packages) and path not in _open_files and code not in _open_functions


def _begins_ours(frame: FrameType) -> bool:
    """Whether it is a context manager's own frame, about to run a generator of ours, or just after that."""
    if frame.f_code.co_filename != contextlib.__file__ or frame.f_code.co_name not in ("__enter__", "__exit__"):
        return False
    generator = getattr(frame.f_locals.get("self"), "gen", None)
    return generator is not None and _is_covered(generator.gi_code)


# ---- the handler ---------------------------------------------------------------------------------------------------


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    raise_outside(frame)


def guard(holder: object) -> None:
    """Until `unguard` is called for ``holder``, which is alive until then: Ctrl-C is raised outside of our code, where
    Python's own handler would have raised it. Any thread."""
    with _lock:
        _guards.add(id(holder))
    renew()


def renew() -> None:
    """Take Python's own handler's place again, where somebody has put it back, as notebooks do after each cell. Any
    thread."""
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGINT, _on_interrupt)


def unguard(holder: object) -> None:
    """See `guard`. What waits by then is still raised. Can be called again, wherever an interrupt has left it."""
    with _lock:
        _guards.discard(id(holder))
        last = not _guards
    if (
        last
        and signal.getsignal(signal.SIGINT) is _on_interrupt
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)
