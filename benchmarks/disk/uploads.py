"""How long it takes to have a tensor of the page files on the device: whole tensors one tier after the other, and page
by page.

    python -m benchmarks.disk.uploads --dir DIR
    python -m benchmarks.disk.uploads --dir DIR --device cuda

Each round reads the tensor alone, copies it up alone, and brings it up both ways, in turns, with fresh random bytes.
What neither way can be faster than is the slower one of the two legs. The machine is otherwise idle; beside training
the cores have other things to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Spread
from pagemem.devices.accelerator import Accelerator, RamDevice
from pagemem.devices.arena import HostArena
from pagemem.devices.cuda import CudaDevice
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import FrameId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import NullSink
from pagemem.tier import Tag
from pagemem.units import MiB

READ, COPY, WHOLE, PAGES = "read", "copy", "one tier after the other", "page by page"


class Tiers:
    """A tensor in page files, with room for it in host memory and on a device."""

    def __init__(self, folder: Path, n_bytes: int, page_bytes: int, device: Accelerator, **options: Any) -> None:
        self._undo = ExitStack()
        directory = self._undo.enter_context(RunDirectory(folder))
        files = PageFiles([directory], page_bytes=page_bytes, **options)
        self._undo.callback(files.close)
        n_frames = n_bytes // page_bytes
        arena = HostArena(n_frames, page_bytes, device.pin)
        self._undo.callback(arena.close)
        self.host = HostMover(arena, files, NullSink())
        above = device.make_arena(n_frames, page_bytes)
        self._undo.callback(above.close)
        self.device = DeviceMover(above, self.host, device, NullSink())
        self._undo.callback(self.device.close)
        self._tells = self.host.on_part
        self.lower = self.host.create("tensor", Tag.PARAM, n_bytes)
        self.upper = self.device.mirror(self.lower)
        self._refresh()
        self._leave()

    def close(self) -> None:
        """Give everything back."""
        self._undo.close()

    def round(self) -> dict[str, float]:
        """Seconds of each way."""
        found = {READ: self._timed(self._read)}
        found[COPY] = self._timed(self._copy)
        self._leave()
        for way in (WHOLE, PAGES):
            self.host.on_part = self._tells if way == PAGES else None
            found[way] = self._timed(self._bring)
            self._leave()
        return found

    def _bring(self) -> None:
        self.device.start_load(self.upper, FrameId(0))
        self._read()
        self._there(self.device, self.upper)

    def _read(self) -> None:
        self.host.start_load(self.lower, FrameId(0))
        self._there(self.host, self.lower)

    def _copy(self) -> None:
        self.device.start_load(self.upper, FrameId(0))
        self._there(self.device, self.upper)

    def _there(self, mover: Mover, tensor: PagedTensor) -> None:
        mover.monitor.wait_until(lambda: tensor.state is Residency.CLEAN, tensor.name)
        if tensor is self.upper:
            self.device.wait_for(tensor)
            self.device.accelerator.record_event().wait()

    def _refresh(self) -> None:
        """Fresh random bytes in the page files: zeros can be faster than data."""
        self.host.start_load(self.lower, FrameId(0))
        self.host.touch(self.lower)
        content: Any = self.host.tenants.bytes_of(self.lower).numpy()
        for start in range(0, len(content), MiB):
            content[start : start + MiB] = np.frombuffer(os.urandom(MiB), np.uint8)
        self.host.store_all()

    def _leave(self) -> None:
        """Have nothing of the tensor above the page files."""
        self.host.monitor.settle()
        for mover, tensor in ((self.device, self.upper), (self.host, self.lower)):
            if tensor.frame is not None:
                mover.drop(tensor)

    @staticmethod
    def _timed(act: Callable[[], None]) -> float:
        began_s = time.perf_counter()
        act()
        return time.perf_counter() - began_s


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disk.uploads", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--mib", type=int, nargs="+", default=[16, 64, 256], help="sizes of the tensor (default: 16 64 256)"
    )
    parser.add_argument("--page-mib", type=int, default=4)
    parser.add_argument(
        "--request-mib", type=int, default=16, help="longest request to the system; 16 is the engine's without a device"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu-emulated", "cuda"], default="cpu-emulated")
    parser.add_argument("--limit-mb-per-s", type=float, help="model a slower disk")
    common.common_arguments(parser)
    chosen = parser.parse_args()
    if any(mib % chosen.page_mib for mib in chosen.mib):
        parser.error("--mib must be multiples of --page-mib")
    return chosen


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Time every size; returns the record."""
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    device: Accelerator = CudaDevice() if a.device == "cuda" else RamDevice()
    found = []
    for mib in a.mib:
        with tempfile.TemporaryDirectory(dir=a.dir) as folder:
            tiers = Tiers(
                Path(folder) / "pages",
                mib * MiB,
                a.page_mib * MiB,
                device,
                max_request_bytes=a.request_mib * MiB,
                limit_mb_per_s=a.limit_mb_per_s,
            )
            try:
                tiers.round()  # first touches
                rounds = [tiers.round() for _ in range(a.rounds)]
            finally:
                tiers.close()
        found.append({"mib": mib, "rounds": rounds})
        print(
            f"{mib} MiB: {', '.join(f'{way} {statistics.median(r[way] for r in rounds):.4f} s' for way in rounds[0])}",
            file=sys.stderr,
        )
    return {
        "benchmark": "uploads",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "sizes": found,
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows for each size."""
    rows = []
    for size in record["sizes"]:
        for other, seconds in ((WHOLE, _seconds(size, WHOLE)), ("the slower of read and copy", _slower_leg(size))):
            ours = _seconds(size, PAGES)
            ratio = Spread.bootstrap([one / two for one, two in zip(ours, seconds, strict=True)])
            medians = {"step_s": statistics.median(ours), "other_step_s": statistics.median(seconds)}
            what = f"upload of {size['mib']} MiB, {PAGES} / {other}"
            rows.append(common.ratio_row(what, ratio, pairs=len(ours), steps_per_turn=1, **medians))
    return rows


def _seconds(size: dict[str, Any], way: str) -> list[float]:
    return [found[way] for found in size["rounds"]]


def _slower_leg(size: dict[str, Any]) -> list[float]:
    return [max(found[READ], found[COPY]) for found in size["rounds"]]


def main() -> None:
    """Measure and print."""
    a = arguments()
    record = measure(a)
    common.save(a, record, csv_rows(record))
    rows = []
    for size in record["sizes"]:
        milliseconds = {way: Spread.of([1e3 * r[way] for r in size["rounds"]]) for way in (READ, COPY, WHOLE, PAGES)}
        rows += [(f"{size['mib']} MiB, {way}", f"{spread} ms") for way, spread in milliseconds.items()]
        floor = [r[PAGES] / max(r[READ], r[COPY]) for r in size["rounds"]]
        rows.append((f"{size['mib']} MiB, page by page / the slower leg", str(Spread.of(floor))))
        rows.append(
            (
                f"{size['mib']} MiB, page by page / one after the other",
                str(Spread.of([r[PAGES] / r[WHOLE] for r in size["rounds"]])),
            )
        )
    common.show(
        f"a tensor from the page files to {a.device}, {a.rounds} rounds, pages of {a.page_mib} MiB",
        rows,
        record,
        as_json=a.json,
    )


if __name__ == "__main__":
    main()
