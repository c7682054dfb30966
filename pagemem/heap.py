"""The C library's heap while a model is built: large blocks leave the process when they are freed.

glibc serves a block from its heap once a block of that size was freed before. A model's parameters, freed one by one as
they move to pages, then leave holes that small objects nibble at and the next parameter just misses, and the heap grows
by the size of the model. Blocks mapped by themselves do not. In training the same setting would map and fault in every
activation anew, so it ends with the building.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pagemem.units import MiB

# From malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: Blocks of this size or more are mapped by themselves meanwhile.
BUILDING_BYTES: Final = 1 * MiB
#: Afterwards: the largest that glibc takes, which is where its own rule ends up after a step of training.
TRAINING_BYTES: Final = 32 * MiB


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Inside, freed blocks of `BUILDING_BYTES` or more go back to the system at once. No effect where libc is not glibc.

    The setting is the process's. It replaces glibc's rule of learning thresholds from what is freed, before and after.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, BUILDING_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * BUILDING_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, TRAINING_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * TRAINING_BYTES)
