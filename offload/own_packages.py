"""The packages of this distribution that others have names like, too: the right ones are imported, and an interrupt
never comes in the middle of their code."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Final

_NAMES: Final = ("pagemem", "scheduler", "optim")
#: Modules of `offload` that call the rest, and may be interrupted.
_OPEN_FILES: Final = (
    "__main__.py", "cli.py", "launch/train.py", "launch/loop.py", "launch/profile_run.py", "machine/doctor.py",
)  # fmt: skip


def find() -> None:
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
