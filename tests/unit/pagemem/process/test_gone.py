"""Things that are watched, and the notes of those that are gone."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType
from typing import Any

import torch

from pagemem.devices.arena import HostArena
from pagemem.frames.page import FrameId, TensorId
from pagemem.process.gone import Gone
from pagemem.units import KiB


class Thing:
    """Can be watched."""


def test_notes_come_in_the_order_in_which_things_went() -> None:
    gone: Gone[str] = Gone()
    first, second, third = Thing(), Thing(), Thing()
    gone.watch(first, "first")
    gone.watch(second, "second")
    gone.watch(third, "third")
    assert gone.take() == [] and len(gone) == 3
    del second
    del first
    assert len(gone) == 3 and gone.take() == ["second", "first"] and len(gone) == 1
    assert gone.take() == []
    del third
    assert gone.take() == ["third"]


def test_a_thing_may_be_watched_twice_and_go_in_a_cycle_or_on_another_thread() -> None:
    gone: Gone[int] = Gone()
    thing: Any = Thing()
    thing.itself = thing
    gone.watch(thing, 1)
    gone.watch(thing, 2)
    del thing
    gc.collect()
    assert sorted(gone.take()) == [1, 2]
    held = [Thing()]
    gone.watch(held[0], 3)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert gone.take() == [3]


def test_no_code_written_in_python_runs_when_a_lease_ends() -> None:
    arena = HostArena(2, 64 * KiB)
    lease = arena.lease(TensorId(7), FrameId(1), 0, torch.float32, 16)
    alias = lease.view(4, 4)
    called: list[str] = []

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    sys.setprofile(watch)
    del lease
    del alias
    sys.setprofile(None)
    assert called == [] and arena.ended_leases() == [TensorId(7)]
    arena.close()
