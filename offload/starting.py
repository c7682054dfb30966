"""What comes before the imports of `offload`: Ctrl-C while the command is still being imported, which is one line and
exit code 130, and a look for packages of others that have names like ours.

Importing torch takes seconds, in which nothing is open and nothing is to be put in order. A KeyboardInterrupt there
would be a long traceback, or be swallowed by an import in C, which leaves a module half made. What is imported here is
small.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Final

_INTERRUPTED: Final = 128 + signal.SIGINT
#: Top-level packages of this distribution, whose names others use too.
_NAMES: Final = ("pagemem", "scheduler", "optim")
#: Modules of `offload` that call the rest, and may be interrupted.
_OPEN_FILES: Final = (
    "__main__.py", "cli.py", "launch/train.py", "launch/loop.py", "launch/profile_run.py", "machine/doctor.py",
)  # fmt: skip


def begin() -> None:
    """First of all: where this process is the command, end it on Ctrl-C until `end`. In other programs nothing is
    changed."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def end() -> None:
    """Ctrl-C raises KeyboardInterrupt from here on, where `begin` has changed that."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"offload: interrupted before anything began\n")
    os._exit(_INTERRUPTED)


def _is_command() -> bool:
    """Whether the program is ``python -m offload``, or its own file is one that imports ``offload.cli``, as the
    installed script's does."""
    if sys.argv[0] == "-m":  # Of a module that is still looked for, whose name is before its arguments.
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") in ("offload", "offload.__main__", "offload.cli")
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "__main__" and "offload.cli" in frame.f_code.co_names


def find_own_packages() -> None:
    """Make sure that our packages, and not foreign ones of the same name, are what gets imported; then have Ctrl-C
    wait until their code has returned.

    Raises:
        ImportError: one resolves to another distribution's file; the message names it and the remedy.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _NAMES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found.parent.parent != home:
            raise ImportError(
                f"offload needs its own package {name!r} from {home}, but importing it finds {found or 'nothing'}; "
                f"uninstall the other distribution that provides {name!r}, or put {home} first on sys.path"
            )
    from pagemem.process import interrupts  # not before it is known to be ours

    for name in _NAMES:
        interrupts.cover(str(importlib.import_module(name).__file__))
    interrupts.cover(__file__, open_files=_OPEN_FILES)
