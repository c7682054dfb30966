"""The C library's heap: when what is free in it leaves the process, and when it stays for the next step.

Building: glibc serves a block from its heap once a block of that size was freed before. A model's parameters, freed one
    by one as
they move to pages, then leave holes that small objects nibble at and the next parameter just misses, and the heap grows
by the size of the model. Blocks mapped by themselves do not. In training the same setting would map and fault in every
activation anew, so it ends with the building.

Training, for time: a page that was given back is mapped and cleared anew when it is touched again, 0.25 ms a megabyte
and more in a virtual machine. By glibc's own rule that happens in every step to all blocks of `TRAINING_BYTES` or more,
such as a loss's tensors of the logits' size. `keep_freed_memory` has the heap keep everything, which takes about as
much more RAM as they do.

Training, for memory: an activation that is freed between two that live on leaves a hole that the next one of its size
just misses. torch aligns blocks to 64 bytes, for which glibc looks for 96 more than the block takes, and what it cuts
off goes to its cache of small blocks (tcache), which does not join it to the block again when that is freed.
`ForwardEnd` gives such holes back just before most is alive. After each step, when nearly all of the heap is free, it
would have to be mapped anew for the next one.

Training over quantised weights: each is unpacked for each use, and between two such copies lie small blocks that live
on. So each just misses the hole of the one before, and the heap grows by hundreds of megabytes in each step: 1,098 MB
after three steps of four blocks of 2048 x 5632, where 249 MB do without tcache. Mapping blocks of `UNPACKING_BYTES`
anew costs a product with 64 tokens 1 % of processor time, and one with 512 tokens 7 %.

Training, for both: a process that was started with `TUNABLE` in its environment has no such cache and few such holes,
so that keeping everything takes little more than trimming does. It is too late for it once the process runs.

All settings are the process's; each function here has no effect where libc is not glibc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from offload import knobs
from pagemem.frames.page import TensorId
from pagemem.units import MiB

# From malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
#: glibc's own number of blocks that may be mapped by themselves.
_MAPPED_BLOCKS: Final = 65536
_NEVER: Final = -1
#: Blocks of this size or more are mapped by themselves meanwhile.
BUILDING_BYTES: Final = 1 * MiB
#: Afterwards: the largest that glibc takes, which is where its own rule ends up after a step of training.
TRAINING_BYTES: Final = 32 * MiB
#: The same where weights are unpacked for each use: most of such copies, and next to nothing else of small batches.
UNPACKING_BYTES: Final = 4 * MiB
#: glibc reads it when a process starts: freed blocks join their neighbours at once instead of being cached.
TUNABLE: Final = "glibc.malloc.tcache_count=0"
TUNABLES_VARIABLE: Final = "GLIBC_TUNABLES"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def give_back_free_pages(worth_bytes: int | None = None) -> None:
    """Give the system every whole page that is free in the heap, if at least ``worth_bytes`` are; by default
    `knobs.WORTH_TRIMMING_BYTES`."""
    libc = ctypes.CDLL(None)
    info, trim = getattr(libc, "mallinfo2", None), getattr(libc, "malloc_trim", None)
    if info is None or trim is None:
        return
    info.restype = _Mallinfo2
    if info().fordblks >= (knobs.WORTH_TRIMMING_BYTES if worth_bytes is None else worth_bytes):
        trim(0)


class ForwardEnd:
    """Has the heap's free pages given back once in each forward pass, when the last of its tensors is first used.

    Which tensors a pass uses is taken from the pass before. Training thread only.

    Args:
        give_back: called then.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._passes = 0
        self._missing: set[TensorId] = set()
        self._used: set[TensorId] = set()

    def forward_use(self, tensors: Collection[TensorId], everything: Collection[TensorId]) -> None:
        """A forward pass is about to use ``tensors``; the first pass is expected to use ``everything``."""
        if not self._used and not self._passes:
            self._missing = set(everything)
        if not self._used and self._passes == 1:
            # The first pass found the heap without holes; what it left lies as none of the later ones finds it.
            self._give_back()
        self._used.update(tensors)
        if self._missing:
            self._missing.difference_update(tensors)
            if not self._missing:
                self._give_back()

    def backward_use(self) -> None:
        """A backward pass uses parameters, so the forward pass is over."""
        if self._used:
            self._passes += 1
            self._missing, self._used = self._used, set()


def keep_freed_memory() -> None:
    """From here on nothing that is freed leaves the process by itself."""
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER})


def give_back_large_blocks(least_bytes: int = TRAINING_BYTES) -> None:
    """From here on freed blocks of ``least_bytes`` or more leave the process at once; undoes `keep_freed_memory`."""
    # glibc's own trimming gives back what the next step maps again; `ForwardEnd` has the better moment.
    _set({_M_MMAP_MAX: _MAPPED_BLOCKS, _M_MMAP_THRESHOLD: least_bytes, _M_TRIM_THRESHOLD: 8 * TRAINING_BYTES})


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Inside, freed blocks of `BUILDING_BYTES` or more go back to the system at once, afterwards those of
    `TRAINING_BYTES`.

    It replaces glibc's rule of learning thresholds from what is freed, before and after.
    """
    _set({_M_MMAP_MAX: _MAPPED_BLOCKS, _M_MMAP_THRESHOLD: BUILDING_BYTES, _M_TRIM_THRESHOLD: 2 * BUILDING_BYTES})
    try:
        yield
    finally:
        give_back_large_blocks()


def _set(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def without_tcache(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment for a process whose freed blocks join their neighbours at once; None where starting it would
    change nothing.

    Tunables for other things stay as they are; one for the same thing is somebody's decision and stands.
    """
    tunables = [tunable for tunable in environment.get(TUNABLES_VARIABLE, "").split(":") if tunable]
    name = TUNABLE.partition("=")[0]
    if not _is_glibc() or any(tunable.partition("=")[0] == name for tunable in tunables):
        return None
    return {**environment, TUNABLES_VARIABLE: ":".join([*tunables, TUNABLE])}


def tcache_disabled() -> bool:
    """Whether this process was started with `TUNABLE`, and its libc is one that heeds it."""
    if not _is_glibc():
        return False
    try:
        at_start = Path("/proc/self/environ").read_bytes()
    except OSError:
        return False
    found = [
        value
        for name, _, value in (entry.partition(b"=") for entry in at_start.split(b"\0"))
        if name == TUNABLES_VARIABLE.encode()
    ]
    return bool(found) and TUNABLE.encode() in found[-1].split(b":")


def _is_glibc() -> bool:
    return getattr(ctypes.CDLL(None), "gnu_get_libc_version", None) is not None
