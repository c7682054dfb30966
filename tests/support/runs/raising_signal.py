"""A signal whose handler raises, at an instant that the test chooses: where the interpreter looks for signals in code
of ours.

It does so when a Python function begins and after each call of one written in C; a profile function is called there,
and what it raises comes out as a handler's exception would. Backward jumps, where it looks as well, are not among the
instants.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pagemem

HOME = str(Path(str(pagemem.__file__)).parent.parent)
OURS = tuple(f"{HOME}/{name}/" for name in ("pagemem", "scheduler", "optim", "offload"))


class Raised(SystemExit):
    """What the handler raises: nothing that code of ours catches for its own ends."""


class Instants:
    """Counts instants; raises at number ``at``, counted from 1; 0: never."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    @property
    def raised(self) -> bool:
        """Whether it has come to that."""
        return 0 < self.at <= self.count

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(OURS):
            return
        self.count += 1
        if self.count == self.at:
            sys.setprofile(None)
            raise Raised(143)


@contextmanager
def raising(at: int) -> Iterator[Instants]:
    """Inside the block, a signal's handler raises at instant ``at`` of this thread."""
    instants = Instants(at)
    sys.setprofile(instants)
    try:
        yield instants
    finally:
        sys.setprofile(None)
