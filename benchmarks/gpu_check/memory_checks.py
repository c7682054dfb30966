"""Checks of memory, copies and waits on a device, see `benchmarks.gpu_check.checks`."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu_check.setting import PLANNED, Outcome, Run, Setting, Status, judged, synchronize
from pagemem.devices.accelerator import Accelerator
from pagemem.devices.arena import Arena, HostArena
from pagemem.devices.host_memory import usable_bytes
from pagemem.frames.page import FrameId
from pagemem.units import GiB, MiB, format_bytes

UPLOAD_BAR_GB_PER_S: Final = 40
PINNED_BYTES: Final = 64 * GiB
WAITING_BAR: Final = 0.1
POOL_BAR_BYTES: Final = MiB
_PAGE_BYTES: Final = 4 * MiB


def arenas(setting: Setting) -> tuple[Accelerator, HostArena, Arena]:
    """A device, host memory that is pinned for it, and as much of its own."""
    device = setting.accelerator()
    n_frames = (64 * MiB if setting.emulated else GiB) // _PAGE_BYTES
    host = HostArena(n_frames, _PAGE_BYTES, device.pin or (lambda address, n_bytes: lambda: None))
    return device, host, device.make_arena(n_frames, _PAGE_BYTES)


def all_of(arena: Arena) -> torch.Tensor:
    """All of its bytes."""
    return arena.view(FrameId(0), 0, torch.uint8, arena.n_bytes)


def fork(setting: Setting) -> Outcome:
    """A child while host memory is pinned: the parent writes, what is copied up is what it wrote, and no memory is
    copied."""
    device, arena, above = arenas(setting)
    source, into = all_of(arena), all_of(above)
    source.fill_(1)
    before_bytes = usable_bytes()
    ready, release = os.pipe()
    child = os.fork()
    if not child:
        os.close(release)
        os.read(ready, 1)
        os._exit(0)
    os.close(ready)
    source.fill_(2)
    taken_bytes = before_bytes - usable_bytes()
    copy = device.copy_up(source, into, device.record_event())
    copy.wait()
    right = int((into == 2).sum())
    os.close(release)
    os.waitpid(child, 0)
    # Where nothing is pinned, others on the machine are all that could be measured.
    good = right == arena.n_bytes and (setting.emulated or taken_bytes < arena.n_bytes // 2)
    return judged(
        good,
        f"{right} of {arena.n_bytes} bytes right",
        "" if setting.emulated else f"{max(0, taken_bytes) / MiB:.0f} MiB more in use",
    )


def synchronisations(setting: Setting) -> Outcome:
    """One planned step, with a warning for each synchronisation."""
    run = Run(setting, setting.config())
    run.steps(PLANNED)
    x, y = run.batch()
    synchronize(setting.torch_device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run.engine.backward(run.engine(x, y))
            run.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(entry.filename).name}:{entry.lineno}" for entry in caught if "synchronizing CUDA" in str(entry.message)
    ]
    run.engine.close()
    return judged(not places, f"{len(places)} in a planned step", ", ".join(dict.fromkeys(places)))


def host_memory(setting: Setting) -> Outcome:
    """Ten steps; then what torch's pinned pool has beside what is stated."""
    run = Run(setting, setting.config())
    run.steps(10)
    pool_bytes = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    store = run.engine.debug.store
    used_bytes, limit_bytes = store.budget.used_bytes, store.budget.limit_bytes
    run.engine.close()
    good = pool_bytes <= POOL_BAR_BYTES and used_bytes <= limit_bytes
    return judged(good, f"{pool_bytes} bytes in torch's pool", f"{used_bytes} of memory.ram = {limit_bytes} reserved")


def pinning(setting: Setting) -> Outcome:
    """64 GiB pinned once, and let go of."""
    left_bytes = usable_bytes()
    if left_bytes < PINNED_BYTES + 4 * GiB:
        return Outcome(Status.SKIPPED, detail=f"{format_bytes(left_bytes)} of RAM left, 68 GiB needed")
    device = setting.accelerator()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began_s = time.perf_counter()
        arena = HostArena(PINNED_BYTES // _PAGE_BYTES, _PAGE_BYTES, device.pin)
        spent_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    arena.close()
    return judged(True, f"{spent_s:.1f} s for 64 GiB", f"unpinned in {time.perf_counter() - began_s:.1f} s")


def uploads(setting: Setting) -> Outcome:
    """Copies of pinned pages up."""
    device, arena, above = arenas(setting)
    source, into = all_of(arena), all_of(above)
    source.random_()
    rates = []
    for _ in range(11):
        copy = device.copy_up(source, into, device.record_event())
        copy.wait()
        rates.append(arena.n_bytes / copy.seconds() / 1e9)
    same = torch.equal(into.cpu(), source)
    best = max(rates[1:])
    return judged(
        same and (setting.emulated or best >= UPLOAD_BAR_GB_PER_S),
        f"{best:.1f} GB/s",
        "" if same else "not the same bytes",
    )


def waiting(setting: Setting) -> Outcome:
    """A thread that waits for an event behind a long kernel."""
    device = setting.accelerator()
    found: list[float] = []
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # about a second
    event = device.record_event()

    def wait() -> None:
        device.use_in_thread()
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        event.wait()
        found.append((time.thread_time() - began_cpu_s) / (time.perf_counter() - began_s))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    return judged(found[0] <= WAITING_BAR, f"{found[0]:.3f} of the time it waits")
