"""What holds for every test: no thread, descriptor or mapping of ours outlives it, and hypothesis is reproducible."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("suite")


def _descriptors() -> set[str]:
    """What this process has open, by target; the interpreter's own caches are left out."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith("/") and "/site-packages/" not in target and not target.startswith("/dev/"):
            found.add(f"{entry} -> {target}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaks a thread, or a descriptor into its own folder."""
    threads = set(threading.enumerate())
    yield
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread not in threads and not thread.name.startswith("pydevd")]
    assert not left, f"threads left running: {left}"
    opened = [entry for entry in _descriptors() if str(tmp_path) in entry]
    assert not opened, f"descriptors left open: {opened}"
