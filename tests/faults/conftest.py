"""Page files with a disk that misbehaves on demand."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from page_file_bench import Bench


@pytest.fixture(params=[None, False], ids=["probed", "aiofiles"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A bench for each backend; afterwards no thread and no descriptor is left."""
    threads, descriptors = set(threading.enumerate()), os.listdir("/proc/self/fd")
    with ExitStack() as stack:
        yield Bench(tmp_path, request.param, stack)
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
