"""What a forked child has of its parent's engines: nothing that works.

A child has copies of their records, but none of the threads that move pages, and locks as somebody held them at that
moment: whoever waited there would wait for ever. So everything that would is told in the child, before anything else
runs there, and from then on raises at once. The parent notices nothing.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


def disowned(name: str) -> RuntimeError:
    """The error for a use, in a child, of what is called ``name``."""
    return RuntimeError(
        f"{name}: this process was forked from the one that trains, which alone can use its engine; give the child "
        "model.state_dict(), "
        'or start it with the "spawn" method'
    )


class Inherited(Protocol):
    """Something that a child inherits and must not use."""

    def disown(self) -> None:
        """Called in a child: refuse from now on, and give back nothing that is the parent's. Takes no lock."""


_alive: WeakSet[Inherited] = WeakSet()


def disown_in_children(thing: Inherited) -> None:
    """Have children that are forked from now on disown it."""
    _alive.add(thing)


def _disown_all() -> None:
    for thing in list(_alive):
        thing.disown()


os.register_at_fork(after_in_child=_disown_all)
